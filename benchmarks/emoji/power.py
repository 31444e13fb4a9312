"""Compute the smallest differences that the comparison can detect, from four validation seeds.

    python benchmarks/emoji/power.py

writes ``benchmarks/results/emoji/power.json``: for three contrasts in `tasks`, the smallest
difference that 3, 5 and 8 seeds detect with 80 % power, at the 5 % level and at a third of it,
Holm's first step for three scenarios. Variances by concept are scaled to the test concepts.
"""

import sys
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, write_record

from emoji.analysis import PILOT, STAGE_1, Question, fit, select
from emoji.compare import own_rate, scores_table
from emoji.federation import SEEDS, divide
from emoji.runs import PACKAGES, Job, parser, run_all
from emoji.search import read_rates

SCENARIO = "tasks"
CONTRASTS = (
    Question("", STAGE_1, (SCENARIO,), "other_task"),
    Question("", "fedavg_per_task", (SCENARIO,)),
    Question("", PILOT, (SCENARIO,), method="pilot_auto"),
)
NUMBERS = (3, 5, 8)
"""Numbers of seeds."""


def main() -> None:
    """Run, and write the detectable differences."""
    options = parser(__doc__).parse_args()
    rates = read_rates()
    jobs = [
        Job(SCENARIO, seed, method, own_rate(method, rates))
        for method in dict.fromkeys(m for q in CONTRASTS for m in (q.method, q.baseline))
        for seed in SEEDS["validation"]
    ]
    scores = scores_table(run_all(jobs, options))
    concepts = len(divide().federated["test"])
    shown = {}
    for question in CONTRASTS:
        rows = select(scores, SCENARIO, question.kind)
        found = fit(rows, question.method, question.baseline)
        assert found is not None
        name = f"{question.method} - {question.baseline}, {question.kind or 'all'}"
        for seeds in NUMBERS:
            expected = found.scaled(seeds=seeds, concepts=concepts)
            shown[f"{name}, {seeds} seeds"] = {
                "single": round(expected.detectable(level=0.05), 4),
                "corrected": round(expected.detectable(level=0.05 / 3), 4),
            }
    write_record(RESULTS / "emoji" / "power.json", {"detectable": shown}, packages=PACKAGES)


if __name__ == "__main__":
    main()
