"""Compare all methods, and Pilot's ablations, on the emoji federations: test rows, five seeds.

    python benchmarks/emoji/compare.py

writes ``benchmarks/results/emoji``: ``runs.csv`` with a row per run, ``scores.csv.gz`` with the
score of every test example by each method, ``neighbors.csv`` with the numbers of neighbours of
`pilot` and `pilot_auto`, and ``compare.json``. Searched methods use the rate that
``search.py`` chose for them, other variants of Pilot use Pilot's. Repeat the command to resume.
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
from _record import RESULTS, write_record

from emoji.analysis import ABLATIONS, ALL_SCENARIOS, PILOT, TASKS_DIFFER
from emoji.federation import SCENARIOS, SEEDS, TASKS, number_of, task_of
from emoji.runs import PACKAGES, Job, JobResult, parser, run_all, time_of
from emoji.search import METHODS, job_of, label_of, mean_over_tasks

FOLDER = RESULTS / "emoji"
KEY = ["scenario", "seed", "client", "row"]
"""Columns of a table of scores that name a test row; the others are methods."""
COUNTED = (PILOT, "pilot_auto")
"""Methods whose neighbours are counted."""
NEIGHBORS = ("neighbors", *TASKS, "same_house")
"""Columns of numbers in ``neighbors.csv``: all, by task, and of the client's own house."""


def jobs(seeds: Sequence[int]) -> list[Job]:
    """Return all jobs of every seed: the methods by scenario, then the ablations.

    With one task, `fedavg_per_task` equals `fedit`, so it is not run in `houses`.
    """
    where = {**dict.fromkeys(METHODS, ALL_SCENARIOS), "fedavg_per_task": TASKS_DIFFER}
    return [
        job_of(scenario, seed, label)
        for seed in seeds
        for group in (where, ABLATIONS)
        for scenario in ALL_SCENARIOS
        for label in group
        if scenario in group[label]
    ]


def runs_table(found: Iterable[JobResult]) -> pd.DataFrame:
    """Return a row per run: settings, mean over tasks, time and code."""
    return pd.DataFrame(
        {
            "scenario": one.job.scenario,
            "seed": one.job.seed,
            "method": label_of(one.job),
            "rate": "".join(one.job.overrides[:1]),
            "mean": round(mean_over_tasks(one), 4) if one.scores else None,
            "seconds": one.seconds,
            "bytes_up": one.bytes_up,
            "bytes_down": one.bytes_down,
            "inputs": one.inputs,
            "commit": one.code["commit"],
            "changed": one.code["changed"],
            "versions": " ".join(f"{k}={v}" for k, v in one.code["versions"].items()),
        }
        for one in found
    )


def scores_table(
    found: Sequence[JobResult], *, label: Callable[[Job], str] = label_of
) -> pd.DataFrame:
    """Return a row per test row and a column per `label`; a diverged run scores 0 on every row."""
    columns: dict[str, dict[tuple[str, int, str, str], float]] = {}
    for one in found:
        column = columns.setdefault(label(one.job), {})
        for client, scores in (one.scores or {}).items():
            for row, score in scores.items():
                column[one.job.scenario, one.job.seed, client, row] = score
    table = pd.DataFrame(columns)
    table.index.names = KEY
    table = table.sort_index()
    for one in found:
        if one.scores is None:
            table.loc[(one.job.scenario, one.job.seed), label(one.job)] = 0.0
    return table


def neighbors_table(found: Iterable[JobResult]) -> pd.DataFrame:
    """Count the neighbours of every task's clients, all and by task and house, in `COUNTED` runs.

    Numbers are means over clients and exchanges. Diverged runs are left out.
    """
    rows = []
    for one in found:
        if label_of(one.job) not in COUNTED or one.scores is None:
            continue
        if one.neighbors is None:
            raise SystemExit(f"{one.job.name} has no neighbours: delete its result and run again.")
        scenario = SCENARIOS[one.job.scenario]
        mixtures = [(client, of) for exchange in one.neighbors for client, of in exchange.items()]
        for task in scenario.tasks:
            own = [(client, of) for client, of in mixtures if task_of(client) == task]
            pairs = [(client, other) for client, of in own for other in of]
            sums = [
                len(pairs),
                *(sum(task_of(other) == t for _, other in pairs) for t in TASKS),
                sum(len({scenario.house(number_of(c)) for c in pair}) == 1 for pair in pairs),
            ]
            means = (round(count / len(own), 3) for count in sums)
            rows.append([one.job.scenario, one.job.seed, one.job.method, task, *means])
    return pd.DataFrame(rows, columns=[*KEY[:2], "method", "task", *NEIGHBORS])


def write_results(found: Sequence[JobResult], folder: Path = FOLDER) -> None:
    """Write the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    runs_table(found).to_csv(folder / "runs.csv", index=False, lineterminator="\n")
    write_scores(found, folder / "scores.csv.gz")
    neighbors_table(found).to_csv(folder / "neighbors.csv", index=False, lineterminator="\n")


def write_scores(
    found: Sequence[JobResult], path: Path, *, label: Callable[[Job], str] = label_of
) -> None:
    """Write the table of all scores."""
    text = scores_table(found, label=label).to_csv(float_format="%.4g", lineterminator="\n")
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_scores(path: Path) -> pd.DataFrame:
    """Return scores as `write_scores` wrote them."""
    return pd.read_csv(path, index_col=KEY)


def main() -> None:
    """Compare, and write the results after every seed."""
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, nargs="*", default=[*SEEDS["test"]], help="seeds")
    options = made.parse_args()
    asked = jobs(options.seeds)
    whole = time_of(len(asked), options.jobs)
    print(f"{len(asked)} runs, {options.jobs} in parallel: {whole} if none has finished.")
    found: list[JobResult] = []
    for seed in options.seeds:
        print(f"Seed {seed}:")
        found += run_all([job for job in asked if job.seed == seed], options)
        write_results(found)
        write_record(
            FOLDER / "compare.json",
            {
                "in_parallel": options.jobs,
                "seconds": round(sum(one.seconds for one in found)),
                "base": json.loads((options.data / "base" / "training.json").read_text()),
            },
            packages=PACKAGES,
        )


if __name__ == "__main__":
    main()
