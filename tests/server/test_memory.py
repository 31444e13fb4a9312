"""The server's memory does not grow with the number of clients."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "server_memory.py"
PARAMETERS = 1_600_000
UPLOAD = 2 * PARAMETERS


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
