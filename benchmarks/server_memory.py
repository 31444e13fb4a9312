"""Measure the server's memory while it receives and aggregates large updates.

A child process receives replies as the ServerApp does (decode, check, spool), bounds their norms,
aggregates them with Pilot's rules and saves the checkpoint. Peak anonymous memory is what the
process itself holds; mapped files are pages that the system can drop. Goal: 64 clients with 45 M
bfloat16 parameters each (5.8 GB of uploads) in at most 2 GiB, mapped pages included, under a memory
limit of the system (a cgroup; only root can set it, and without it the limit is reported as none).

Run ``python benchmarks/server_memory.py`` (20 minutes, 12 GB of disk) to update
``benchmarks/results/server_memory.json``, or ``--quick`` for a few small clients.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, write_record

from pilot_flwr.algorithm.norm_bounds import check_norms
from pilot_flwr.algorithm.server_state import InitialState, ServerState
from pilot_flwr.config.schema import StrategyConfig, UpdateNormConfig
from pilot_flwr.flower.messages import decode_update, encode_result
from pilot_flwr.protocol import LOSSES, Instruction, Member, SessionResult, State, TrainingResult
from pilot_flwr.run.atomic import spool_tensors
from pilot_flwr.run.checkpoint import create_lora, save_checkpoint
from pilot_flwr.run.provenance import RunIdentity

RESULT = RESULTS / "server_memory.json"
TASKS = ("vqa", "counting", "captioning")
CLIENTS, PARAMETERS = 64, 45_000_000
LIMIT = 2 * 2**30
CGROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")


def draw(parameters: int, seed: int) -> State:
    """Draw tensors of one size, 64 of a LoRA's, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    size = parameters // 64
    return {f"{n}.lora_A": torch.randn(size, generator=generator).bfloat16() for n in range(64)}


def reply(client: str, task: str, lora: State, adapter: State) -> Any:
    """Encode a client's reply, as it arrives from Flower."""
    training = TrainingResult(dict.fromkeys(LOSSES, 0.5), 1, 10, 1.0, {"lora": 1})
    instruction = Instruction(1, 1, TASKS, {}, {})
    return encode_result(SessionResult(adapter, lora, training), instruction, client, task)


def anonymous_bytes() -> int:
    """Return this process's anonymous memory."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


class Peak:
    """The highest anonymous memory while a block runs, polled every 10 ms."""

    def __enter__(self) -> "Peak":
        self.bytes, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._ended.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def aggregate(folder: Path, clients: int, parameters: int) -> dict[str, Any]:
    """Receive and aggregate one exchange; return the peak memory, the seconds and the bytes."""
    config = StrategyConfig(update_norm=UpdateNormConfig(action="reject", factor=1e6))
    adapter, lora = draw(parameters // 100, 0), draw(parameters, 1)
    state = ServerState(TASKS, InitialState(adapter, lora))
    started = anonymous_bytes()
    seconds: dict[str, float] = {}
    with Peak() as peak:
        updates, clock = [], time.perf_counter()
        for number in range(clients):
            client, task = f"c{number:04d}", TASKS[number % len(TASKS)]
            change = draw(parameters, number + 2)
            content = reply(client, task, {n: t + change[n] for n, t in lora.items()}, adapter)
            del change
            update = decode_update(content)
            del content
            state.check(update, Member(client, task, 10, 0), 1)
            parts = {p: spool_tensors(getattr(update, p), folder) for p in ("adapter", "lora")}
            updates.append(type(update)(**{**vars(update), **parts}))
            del update
        seconds["receive"], clock = time.perf_counter() - clock, time.perf_counter()
        updates, _ = check_norms(updates, state, config.update_norm)
        state.aggregate(
            updates, config, allocate=lambda client, layout: create_lora(folder, 1, client, layout)
        )
        seconds["aggregate"], clock = time.perf_counter() - clock, time.perf_counter()
        save_checkpoint(
            folder,
            server_round=1,
            adapters=state.adapters,
            loras=state.loras,
            tasks=TASKS,
            task_of=state.task_of,
            run=RunIdentity("benchmark", ""),
            events=0,
        )
        seconds["checkpoint"] = time.perf_counter() - clock
    return {
        "clients": clients,
        "parameters": parameters,
        "upload_bytes": clients * 2 * (parameters + parameters // 100),
        "anonymous_bytes_before": started,
        "peak_anonymous_bytes": peak.bytes,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def limited(limit: int) -> tuple[Path, str] | None:
    """Create a cgroup of `limit` bytes and its file of the peak; None if that is not possible."""
    for root in CGROUPS:
        group = root / f"pilot-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        for name in LIMIT_FILES:
            if (group / name).exists():
                (group / name).write_text(str(limit))
                peak = {"memory.limit_in_bytes": "memory.max_usage_in_bytes"}
                return group, peak.get(name, "memory.peak")
        group.rmdir()
    return None


def measure(clients: int, parameters: int) -> dict[str, Any]:
    """Aggregate in a child process, under the limit if it can be set."""
    group = limited(LIMIT)
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--child", name, str(clients), str(parameters)]

        def enter() -> None:
            if group:
                (group[0] / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(  # nosec B603  # this script
            command, check=True, stdout=subprocess.PIPE, preexec_fn=enter
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["limit_bytes"] = LIMIT if group else None
    if group:
        result["peak_limited_bytes"] = int((group[0] / group[1]).read_text())
        group[0].rmdir()
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, write nothing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        folder, clients, parameters = options.child
        done = aggregate(Path(folder), int(clients), int(parameters))
        print(json.dumps(done))
        return done
    sizes = [(4, 64_000)] if options.quick else [(16, PARAMETERS), (CLIENTS, PARAMETERS)]
    results = {f"{k}_clients": measure(k, parameters) for k, parameters in sizes}
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(RESULT, results, packages=("pilot-flwr", "flwr", "torch", "safetensors"))
    return results


if __name__ == "__main__":
    main()
