"""Kill whole runs at random points, resume them, and compare with an uninterrupted run.

A run is ``pilot-flwr run`` with Flower and Ray as users start it, small but complete: two tasks,
two clients, seven exchanges, both stages, evaluation. A kill is SIGKILL to the launcher and to
all its descendants at once, so that nothing can clean up. The points are drawn at random from a
seed, in turn

- while programs start, before the first event;
- while clients train, at any time after an exchange's instructions were sent;
- when a client's update has arrived, before the aggregation is complete;
- while a checkpoint is being written;
- during the closing evaluation.

After each kill the run is resumed with ``pilot-flwr run resume=RUN``, or started again if it was
killed before it had a folder. At the end its checkpoints, private states, events without times,
scores and tables must equal those of the uninterrupted run, bit by bit.

Run ``python tests/robustness/faults/run.py`` (about 25 minutes) to update
``benchmarks/results/faults.json``; ``--quick`` compares two made-up runs and writes
nothing. Progress goes to standard output, each launcher's output to ``--folder``.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults.kill import PHASES, Attempt, Plan, attempt
from faults.sameness import differences

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
RESULT = BENCHMARKS / "results" / "faults.json"
ROUNDS = 6
SETTINGS = (
    "name=faults",
    "data.tasks=[vqa,counting]",
    "data.clients_per_task=1",
    "data.train_examples=16",
    "data.test_examples=4",
    "train.epochs=1",
    "train.batch_size=4",
    "evaluation.max_new_tokens=4",
    f"strategy.rounds={ROUNDS}",
    "simulation.cpus=2",
)
LIMIT_SECONDS = 900.0


def measure(folder: Path, *, kills: int, kills_a_run: int, seed: int) -> dict[str, Any]:
    """Make a reference run, then runs with kills until there are enough.

    Parameters
    ----------
    folder : Path
        Empty folder for the runs.
    kills : int
        Minimum number in all.
    kills_a_run : int
        Kills of a run before it may finish.
    seed : int
        Seed of the points.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    reference = folder / "reference"
    first = attempt(reference, SETTINGS, None, log=folder / "reference.log", limit=LIMIT_SECONDS)
    if not first.completed:
        raise SystemExit(f"The reference run failed; see {folder / 'reference.log'}.")
    print(f"reference: {first.seconds:.0f} s", flush=True)
    runs: list[dict[str, Any]] = []
    done = 0
    while done < kills:
        name = f"run-{len(runs) + 1}"
        wanted = min(kills_a_run, kills - done)
        history = killed_run(folder, name, wanted, draw, first.seconds_to_news)
        found = differences(reference, folder / name)
        died = [one for one in history if one.killed]
        done += len(died)
        runs.append(
            {
                "kills": [one.describe() for one in died],
                "resumes": sum(one.resumed for one in history),
                "differences": found,
            }
        )
        print(f"{name}: {len(died)} kills, {found or 'identical'}", flush=True)
    phases = Counter(one["phase"] for run in runs for one in run["kills"])
    return {
        "settings": list(SETTINGS),
        "seed": seed,
        "runs": len(runs),
        "kills": done,
        "resumes": sum(run["resumes"] for run in runs),
        "identical": sum(not run["differences"] for run in runs),
        "kills_by_phase": {phase: phases[phase] for phase in PHASES},
        "seconds": round(time.monotonic() - began, 1),
        "each": runs,
    }


def killed_run(
    folder: Path, name: str, kills: int, draw: random.Random, seconds_to_news: float
) -> list[Attempt]:
    """Start a run, kill and resume it `kills` times, then let it finish."""
    path, history = folder / name, list[Attempt]()
    order = draw.sample(PHASES[:-1], len(PHASES) - 1)
    while True:
        died = sum(one.killed for one in history)
        plan = None
        if died < kills and len(history) < 4 * kills:
            last = died == kills - 1 and kills > 1  # nothing but the evaluation comes after it
            wanted = PHASES[-1] if last else order[len(history) % len(order)]
            plan = Plan.drawn(draw, wanted, exchanges_done(path), ROUNDS + 1, seconds_to_news)
        log = folder / f"{name}-{len(history) + 1}.log"
        one = attempt(path, SETTINGS, plan, log=log, limit=LIMIT_SECONDS)
        history.append(one)
        print(f"{name}, attempt {len(history)}: {one.describe()}", flush=True)
        if one.completed:
            return history
        if not one.killed:
            raise SystemExit(f"{name} ended without success; see {log}.")


def exchanges_done(path: Path) -> int:
    """Return the last exchange of which there is a checkpoint."""
    folders = sorted((path / "checkpoint").glob("round-*"))
    return int(folders[-1].name[6:10]) if folders else 0


def make_example(folder: Path) -> None:
    """Write two finished runs that differ in times and in having been resumed, in nothing else."""
    import numpy as np
    import torch

    from pilot_flwr.algorithm.server_state import Aggregation
    from pilot_flwr.client.private_state import PrivateState, PrivateStore
    from pilot_flwr.run.aggregations import write_matrices
    from pilot_flwr.run.checkpoint import save_checkpoint
    from pilot_flwr.run.provenance import RunIdentity

    generator = torch.Generator().manual_seed(0)
    tensors = {"w": torch.rand(3, generator=generator)}
    for number, name in enumerate(("reference", "run-1")):
        path = folder / name
        events = [{"event": "resume", "elapsed": 0.5}] * number
        events += [{"event": "train", "client": "vqa-0", "elapsed": 1.0 + number, "loss": 2.0}]
        path.mkdir()
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (path / "metrics.jsonl").write_text(lines)
        result = {"status": "completed", "failures": [], "scores": {"vqa-0": 0.5}}
        (path / "result.json").write_text(json.dumps(result))
        (path / "summary.md").write_text("| task |\n|---|\n")
        ones = np.ones((1, 1))
        write_matrices(path, 1, Aggregation(["vqa-0"], {"vqa": ["vqa-0"]}, ones, 0 * ones))
        save_checkpoint(
            path / "checkpoint",
            server_round=1,
            adapters={"vqa": tensors},
            loras={"vqa-0": tensors},
            tasks=("vqa",),
            task_of={"vqa-0": "vqa"},
            run=RunIdentity(name, "settings"),
            events=len(events),
        )
        state = PrivateState(1, (), {"client_adapter": tensors})
        PrivateStore(path / "clients" / "vqa-0", "vqa-0", "vqa").save(state, server_round=1)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Kill, resume, compare; write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all (default: 20)")
    parser.add_argument("--kills-a-run", type=int, default=5, help="default: 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep runs and logs in this new folder")
    parser.add_argument("--quick", action="store_true", help="made-up runs, nothing written")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    scratch = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        if options.quick:
            make_example(scratch)
            results = {"differences": differences(scratch / "reference", scratch / "run-1")}
        else:
            results = measure(
                scratch.resolve(),
                kills=options.kills,
                kills_a_run=options.kills_a_run,
                seed=options.seed,
            )
    finally:
        if options.folder is None:
            shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(results, indent=2))
    if not options.quick:
        sys.path.insert(0, str(BENCHMARKS))
        from _record import write_record

        write_record(options.output, results, packages=["flwr", "ray", "torch"])
    return results


if __name__ == "__main__":
    main()
