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
from scipy import stats

from emoji.analysis import PILOT, STAGE_1, Fit, Question, fit, select
from emoji.compare import scores_table
from emoji.federation import SEEDS, divide
from emoji.runs import PACKAGES, parser, run_all
from emoji.search import job_of

SCENARIO = "tasks"
CONTRASTS = (
    Question("", STAGE_1, (SCENARIO,), "other_task"),
    Question("", "fedavg_per_task", (SCENARIO,)),
    Question("", PILOT, (SCENARIO,), method="pilot_auto"),
)
NUMBERS = (3, 5, 8)
"""Numbers of seeds."""
POWER = 0.8


def expected(found: Fit, *, seeds: int, concepts: int) -> Fit:
    """Return the fit expected with other numbers of seeds and concepts, same rows per seed."""
    by_seed = found.by_seed * found.seeds / seeds
    by_both = found.by_both * found.seeds / seeds
    # by_concept - by_both has 1 - 1 / seeds of what a concept's rows share, by_seed the rest.
    shared = max(found.by_concept - found.by_both, 0) * found.concepts / concepts
    shared *= (1 - 1 / seeds) / (1 - 1 / found.seeds)
    rows = found.rows * seeds // found.seeds
    return Fit(found.mean, by_seed, by_both + shared, by_both, seeds, concepts, rows)


def detectable(found: Fit, *, level: float) -> float:
    """Return the difference that a two-sided test at `level` detects with 80 % power."""
    error, freedom = found.error()
    return float(stats.t.ppf([1 - level / 2, POWER], freedom).sum() * error)


def main() -> None:
    """Run, and write the detectable differences."""
    options = parser(__doc__).parse_args()
    jobs = [
        job_of(SCENARIO, seed, method)
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
            then = expected(found, seeds=seeds, concepts=concepts)
            shown[f"{name}, {seeds} seeds"] = {
                "single": round(detectable(then, level=0.05), 4),
                "corrected": round(detectable(then, level=0.05 / 3), 4),
            }
    write_record(RESULTS / "emoji" / "power.json", {"detectable": shown}, packages=PACKAGES)


if __name__ == "__main__":
    main()
