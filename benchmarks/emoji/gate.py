"""Check on validation data that the emoji federation can show what it is for.

A model trained on all clients' data must name concepts that its task knows from other houses, at
least 40 % of them, and concepts that only other tasks know, clearly more than none. If it cannot,
no federated method can, and a comparison would say nothing. Local training is the control: it
cannot know these answers.

    python benchmarks/emoji/gate.py --data outputs/emoji

updates ``benchmarks/results/scenarios/emoji_gate.json`` (four runs, about 20 minutes on one core;
a finished run is kept in ``--out``).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, write_record

METHODS = ("centralised", "local")
SEEDS = (100, 101)
SCENARIO = "both"
GOAL = 0.4
"""Share of names known in other houses."""


def run(method: str, seed: int, data: Path, out: Path) -> list[dict[str, Any]]:
    """Run a method on one validation federation; return every answer of its final models."""
    folder = out / f"{method}-{seed}"
    answers = folder.with_suffix(".jsonl")
    if not answers.exists():
        words = [f"strategy={method}", f"data={data}/{SCENARIO}-{seed}.yaml", f"seed={seed}"]
        words += [f"model.path={data}/base", "simulation.engine=in-process", "run.report=false"]
        command = [sys.executable, "-m", "pilot_flwr.cli.main"]
        start = ["run", "experiment=emoji", *words, "run.tensorboard=false", f"run.folder={folder}"]
        score = ["evaluate", str(folder), "--answers", str(answers)]
        for words in (start, score):
            subprocess.run([*command, *words], check=True)  # nosec B603  # this package, no shell
    return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]


def by_kind(answers: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean score and the number of rows by task and kind."""
    scores = defaultdict(list)
    for answer in answers:
        task = answer["client"].rpartition("-")[0]
        kind = answer["id"].partition(":")[2].partition("/")[0]
        scores[f"{task}, {kind}"].append(answer["score"])
    return {
        name: {"score": round(statistics.mean(found), 4), "rows": len(found)}
        for name, found in sorted(scores.items())
    }


def main() -> None:
    """Run, and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji"))
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji/gate"))
    options = parser.parse_args()
    found = {
        method: {
            str(seed): by_kind(run(method, seed, options.data.resolve(), options.out.resolve()))
            for seed in SEEDS
        }
        for method in METHODS
    }
    packages = ("pilot-flwr", "torch", "transformers", "peft")
    write_record(
        RESULTS / "scenarios" / "emoji_gate.json",
        {"goal": GOAL, "scores": found},
        packages=packages,
    )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
