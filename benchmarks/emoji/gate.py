"""Check on validation data that the emoji federation can show what it is for.

A model trained on all clients' data must name concepts that its task knows from other houses, at
least 40 % of them, and concepts that only other tasks know, clearly more than none. If it cannot,
no federated method can, and a comparison would say nothing. Local training is the control: it
cannot know these answers.

    python benchmarks/emoji/gate.py

writes ``benchmarks/results/emoji/gate.json``.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, write_record

from emoji.federation import kind_of, task_of
from emoji.runs import PACKAGES, Job, JobResult, parser, run_all
from emoji.search import read_rates

METHODS = ("centralised", "local")
SEEDS = (100, 101)
SCENARIO = "both"
GOAL = 0.4
"""Share of names known in other houses."""


def by_kind(found: JobResult) -> dict[str, dict[str, float]]:
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
    rates = read_rates()
    jobs = [Job(SCENARIO, seed, method, (rates[method],)) for method in METHODS for seed in SEEDS]
    scores: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for found in run_all(jobs, options):
        scores.setdefault(found.job.method, {})[str(found.job.seed)] = by_kind(found)
    write_record(
        RESULTS / "emoji" / "gate.json", {"goal": GOAL, "scores": scores}, packages=PACKAGES
    )
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
