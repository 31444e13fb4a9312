"""The server holds uploads and LoRAs in files, not in its memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from inprocess import SMALL, Federation
from quick_training import quick_training

from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.run.atomic import TensorFile

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "server_memory.py"
PARAMETERS = 1_600_000
UPLOAD = 2 * PARAMETERS


@pytest.mark.parametrize("optimizer", ["none", "adam"])
def test_uploads_and_loras_of_a_run_are_mapped_files(tmp_path, monkeypatch, optimizer):
    """Exchanges, a resumed run's LoRAs and the server optimizer's moments: nothing in memory."""
    uploads, aggregate = [], ServerState.aggregate

    def look(state, updates, *args, **kwargs):
        uploads.extend(part for update in updates for part in (update.adapter, update.lora))
        return aggregate(state, updates, *args, **kwargs)

    monkeypatch.setattr(ServerState, "aggregate", look)
    overrides = f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=2 strategy.rounds=1"
    with quick_training():
        federation = Federation(
            tmp_path, f"{overrides} strategy.server_optimizer.name={optimizer}"
        ).run()
    state = federation.strategy.state
    moments = [part for m in state.moments.values() for part in (m.first, m.second)]
    assert len(uploads) == 2 * 4 * 2 and len(state.loras) == 4
    assert bool(moments) == (optimizer == "adam")
    of_loras = [p for t, m in state.moments.items() if "lora" in t for p in (m.first, m.second)]
    assert all(isinstance(part, TensorFile) for part in [*uploads, *state.loras.values()])
    assert all(isinstance(part, TensorFile) for part in of_loras)


@pytest.mark.slow
def test_an_exchange_holds_no_memory_per_client(tmp_path):
    """In a child process: 20 further clients, 64 MB of uploads and as much of mixtures."""
    peaks = {}
    for clients in (4, 24):
        command = [sys.executable, SCRIPT, "--child", tmp_path / str(clients), str(clients)]
        done = subprocess.run([*command, str(PARAMETERS)], check=True, capture_output=True)
        result = json.loads(done.stdout.splitlines()[-1])
        peaks[clients] = result["peak_anonymous_bytes"] - result["anonymous_bytes_before"]
        assert result["upload_bytes"] > clients * UPLOAD
    assert peaks[24] - peaks[4] < 4 * UPLOAD  # of 2 x 20 if all were held
