"""Test on validation rows whether centralised training learns the federated concepts.

The gate passes if its accuracy is at least 40 % on the rows ``name, other_house``, and if the 95 %
interval of its accuracy on ``name, other_task`` lies above 1 %; the interval takes rows as
independent. Local training is the control.

    python benchmarks/emoji/gate.py

writes ``benchmarks/results/emoji/gate.json``.
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, write_record
from scipy.stats import binomtest

from emoji.federation import kind_of, task_of
from emoji.runs import PACKAGES, JobResult, parser, run_all
from emoji.search import job_of

METHODS = ("centralised", "local")
SEEDS = (100, 101)
SCENARIO = "both"
GOALS = {"name, other_house": 0.4, "name, other_task": 0.01}
"""Rows → threshold: of the first the share itself, of the second the lower end of its interval."""


Scores = dict[str, dict[str, float]]
"""Task and kind → mean score and number of rows."""


def by_kind(found: JobResult) -> Scores:
    """Return the mean score and the number of rows by task and kind."""
    scores = defaultdict(list)
    for client, of in (found.scores or {}).items():
        for name, score in of.items():
            scores[f"{task_of(client)}, {kind_of(name)}"].append(score)
    return {
        name: {"score": round(statistics.mean(values), 4), "rows": len(values)}
        for name, values in sorted(scores.items())
    }


def main() -> None:
    """Run, and write the scores."""
    options = parser(__doc__).parse_args()
    jobs = [job_of(SCENARIO, seed, method) for method in METHODS for seed in SEEDS]
    scores: dict[str, dict[str, Scores]] = {}
    for found in run_all(jobs, options):
        scores.setdefault(found.job.method, {})[str(found.job.seed)] = by_kind(found)
    pooled = {rows: total(scores["centralised"].values(), rows) for rows in GOALS}
    results = {"goals": GOALS, "pooled": pooled, "passes": passes(pooled), "scores": scores}
    write_record(RESULTS / "emoji" / "gate.json", results, packages=PACKAGES)
    print(json.dumps(results, indent=2))


def passes(pooled: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether shares of right answers, as `total` returns them, reach `GOALS`."""
    first, second = GOALS
    return pooled[first]["share"] >= GOALS[first] and pooled[second]["low"] > GOALS[second]


def total(seeds: Iterable[Scores], rows: str) -> dict[str, float]:
    """Return the share of correct answers over seeds, with its exact 95 % interval."""
    found = [of[rows] for of in seeds]
    number = sum(int(one["rows"]) for one in found)
    right = sum(round(one["score"] * one["rows"]) for one in found)
    low, high = binomtest(right, number).proportion_ci()
    return {"share": round(right / number, 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main()
