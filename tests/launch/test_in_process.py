"""The in-process engine has the results of Flower's simulation with Ray, bit for bit."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pilot_flwr.cli import main as cli
from pilot_flwr.config.loading import load_config
from pilot_flwr.flower.grid import torch_threads
from pilot_flwr.launch.in_process import node_configs
from pilot_flwr.launch.prepare import engine_options
from pilot_flwr.model import feature_cache as features

BIN = Path(sys.executable).parent
SMALL = [
    "data.tasks=[vqa,counting]",
    "data.clients_per_task=2",
    "data.train_examples=16",
    "data.test_examples=8",
    "train.epochs=1",
    "train.batch_size=4",
    "strategy.rounds=2",
    "model.lora.dropout=0.1",
    "run.report=false",
    "run.tensorboard=false",
]
IN_PROCESS = "simulation.engine=in-process"
TIMES = {"elapsed", "seconds", "started", "turn_seconds"}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(run)}/{name}": tensor
        for file in sorted(run.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def events(run: Path) -> list[dict]:
    """The events but for times, in an order that does not depend on which client was faster."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in e.items() if k not in TIMES} for e in lines if e["event"] != "resume"]
    return sorted(kept, key=lambda e: json.dumps(e, sort_keys=True))


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 100
    differing = [
        name for name in mine
        if mine[name].dtype != theirs[name].dtype or not torch.equal(mine[name], theirs[name])
    ]  # fmt: skip
    assert differing == []
    assert events(one) == events(other)
    scores = [json.loads((run / "result.json").read_text())["scores"] for run in (one, other)]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["pilot", "fedex_lora"])
def test_results_are_those_of_ray_bit_for_bit(tmp_path, strategy):
    def run(name: str, *words: str) -> None:
        command = [BIN / "pilot-flwr", "run", f"strategy={strategy}", *SMALL, *words]
        done = subprocess.run(
            [*command, f"run.folder={tmp_path / name}"],
            cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    run("ray")
    run("here", IN_PROCESS)
    assert_same(tmp_path / "ray", tmp_path / "here")


# A signal between `open` and `with` leaves a file for the garbage collector to close.
@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
def test_a_stopped_run_is_resumed_to_the_same_end(tmp_path, capsys):
    few = [*SMALL, "data.tasks=[vqa]", "strategy.rounds=1", IN_PROCESS]
    assert cli.main(["run", *few, f"run.folder={tmp_path / 'whole'}"]) == 0
    out = capsys.readouterr().out
    assert "exchange 2 of 2 done" in out
    assert "Flower and Ray" not in out
    assert features._MEMORY == {}  # the process may start another run

    stopped = tmp_path / "stopped"

    def stop() -> None:
        while not (stopped / "checkpoint/round-0001").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), 15)

    thread = threading.Thread(target=stop)
    thread.start()
    assert cli.main(["run", *few, f"run.folder={stopped}"]) == 143
    thread.join()
    assert f"To resume: pilot-flwr run resume={stopped}" in capsys.readouterr().err
    assert cli.main(["run", f"resume={stopped}"]) == 0
    assert_same(tmp_path / "whole", stopped)


def test_a_failed_client_fails_the_run(tmp_path, capsys):
    words = [*SMALL, "data.tasks=[vqa]", "train.stage1.connector_lr=1e30", IN_PROCESS]
    assert cli.main(["run", *words, f"run.folder={tmp_path / 'run'}"]) == 1
    error = capsys.readouterr().err
    assert "The run failed." in error
    assert "The loss is nan" in error
    assert (tmp_path / "run/logs/flower.log").read_text()


def test_threads_are_a_workers_and_then_as_before():
    before = torch.get_num_threads()
    with pytest.raises(ValueError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("words", "device"),
    [("", None), ("simulation.gpus=0", "cpu"), ("simulation.client_gpus=0", "cpu")],
)
def test_clients_without_gpus_use_the_cpu(words, device):
    configs = node_configs(load_config(words))
    assert [c["partition-id"] for c in configs] == list(range(9))
    assert {c["num-partitions"] for c in configs} == {9}
    assert {c.get("device") for c in configs} == {device}


def test_ray_address_does_not_concern_the_in_process_engine():
    config = load_config(IN_PROCESS)
    assert engine_options(config, {"RAY_ADDRESS": "10.0.0.1:6379"})[0] == ""
