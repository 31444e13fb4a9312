"""Compute the smallest differences that the comparison can detect, from four validation seeds.

    python benchmarks/emoji/power.py

writes ``benchmarks/results/emoji/power.json``: for two contrasts in `tasks`, the smallest
difference that 3, 5 and 8 seeds detect with 80 % power, at the 5 % level and at a third of it,
Holm's first step for three scenarios. Variances by concept are scaled to the test concepts.
"""

import sys
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, write_record

from emoji.analysis import PILOT, fit, select
from emoji.compare import own_rate, scores_table
from emoji.federation import SEEDS, divide
from emoji.runs import PACKAGES, Job, parser, run_all
from emoji.search import read_rates

SCENARIO = "tasks"
OTHERS = ("pilot_stage1_only", "fedavg_per_task")
NUMBERS = (3, 5, 8)
"""Numbers of seeds."""


def main() -> None:
    """Run, and write the detectable differences."""
    options = parser(__doc__).parse_args()
    rates = read_rates()
    jobs = [
        Job(SCENARIO, seed, method, own_rate(method, rates))
        for method in (PILOT, *OTHERS)
        for seed in SEEDS["validation"]
    ]
    scores = select(scores_table(run_all(jobs, options)), SCENARIO)
    concepts = len(divide().federated["test"])
    shown = {}
    for other in OTHERS:
        found = fit(scores, PILOT, other)
        assert found is not None
        for seeds in NUMBERS:
            expected = found.scaled(seeds=seeds, concepts=concepts)
            shown[f"{PILOT} - {other}, {seeds} seeds"] = {
                "single": round(expected.detectable(level=0.05), 4),
                "corrected": round(expected.detectable(level=0.05 / 3), 4),
            }
    write_record(RESULTS / "emoji" / "power.json", {"detectable": shown}, packages=PACKAGES)


if __name__ == "__main__":
    main()
