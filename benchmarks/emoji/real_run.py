"""Run Pilot once, shortened for a CPU, on the base of ``real_base.py``.

    python benchmarks/emoji/real_base.py
    python benchmarks/emoji/real_run.py

writes ``benchmarks/results/emoji/real.json``: the mean score by task and kind of test row, before
training and after, with one seed. Learning rates were not searched. Ten minutes on two cores.
"""

import sys
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, write_record

from emoji.analysis import PILOT
from emoji.federation import SCENARIOS, SEEDS, write_federation, write_pictures
from emoji.gate import by_kind
from emoji.runs import PACKAGES, Job, JobResult, parser, run_all

SCENARIO, SEED = "both", SEEDS["test"][0]
SIZE, MOST = 100, 10
"""Training concepts of a client; maximum number of its test examples per kind."""
SHORTENED = (
    "simulation.client_cpus=2",
    "strategy.rounds=2",
    "train.epochs=1",
    "train.batch_size=8",
    *(f"train.stage{stage}.{part}_lr=1e-3" for stage in (1, 2) for part in ("lora", "connector")),
)


def scores_of(found: JobResult) -> dict[str, float]:
    """Return the mean score by task and kind of test row."""
    return {cell: of["score"] for cell, of in by_kind(found).items()}


def main() -> None:
    """Run, and write the scores."""
    made = parser(__doc__)
    real = Path("outputs/emoji/real")
    made.set_defaults(data=real, out=real / "runs", jobs=1)
    options = made.parse_args()
    write_pictures(options.data / "pictures")
    write_federation(
        options.data, SCENARIO, SCENARIOS[SCENARIO], split="test", seed=SEED, size=SIZE, most=MOST
    )
    jobs = [Job(SCENARIO, SEED, "zero_shot"), Job(SCENARIO, SEED, PILOT, SHORTENED)]
    before, after = run_all(jobs, options)
    results = {
        "settings": SHORTENED,
        "rows": sum(map(len, (before.scores or {}).values())),
        "seconds": after.seconds,
        "before": scores_of(before),
        "after": scores_of(after),
    }
    write_record(RESULTS / "emoji" / "real.json", results, packages=PACKAGES)


if __name__ == "__main__":
    main()
