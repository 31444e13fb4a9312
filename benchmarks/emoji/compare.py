"""Compare all methods, and Pilot's ablations, on the emoji federations: test rows, five seeds.

    python benchmarks/emoji/compare.py

writes ``benchmarks/results/emoji``: ``runs.csv`` with a row per run, ``scores.csv.gz`` with the
score of every test example by each method, ``neighbors.csv`` with the numbers of neighbours of
`pilot` and `pilot_auto`, and ``compare.json``. Every method uses the scale that
``search.py`` chose for it. Repeat the command to resume.
"""

import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
from _record import RESULTS, write_record

from emoji.analysis import ABLATIONS, EVERYWHERE, PILOT, TASKS_DIFFER
from emoji.federation import SCENARIOS, SEEDS, number_of, task_of
from emoji.runs import PACKAGES, Job, JobResult, parser, run_all, time_of
from emoji.search import METHODS, SEARCHED, mean_over_tasks, read_rates

FOLDER = RESULTS / "emoji"
KEY = ["scenario", "seed", "client", "row"]
"""Columns of a table of scores that name a test row; the others are methods."""
CHOOSING = (PILOT, "pilot_auto")
"""Methods whose neighbours are counted."""
NEIGHBORS = ("neighbors", "of_its_task", "of_its_house")
"""Columns of ``neighbors.csv`` after scenario, seed and method."""


def jobs(seeds: Sequence[int]) -> list[Job]:
    """Return all jobs of every seed: the methods by scenario, then the ablations.

    With one task, `fedavg_per_task` equals `fedit`, so it is not run in `houses`.
    """
    rates = read_rates()
    where = {**dict.fromkeys(METHODS, EVERYWHERE), "fedavg_per_task": TASKS_DIFFER}
    return [
        Job(scenario, seed, method, (*own_rate(method, rates), *more))
        for seed in seeds
        for group in (where, ABLATIONS)
        for scenario in EVERYWHERE
        for method, *more in map(str.split, group)
        if scenario in group[" ".join((method, *more))]
    ]


def own_rate(method: str, rates: dict[str, str]) -> tuple[str, ...]:
    """Return a method's learning-rate override: its own if searched, or Pilot's."""
    if method == "zero_shot":
        return ()
    return (rates[method if method in SEARCHED else PILOT],)


def label_of(job: Job) -> str:
    """Return a job's method with its settings besides the rate."""
    return " ".join((job.method, *job.overrides[1:]))


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


def scores_table(found: Sequence[JobResult]) -> pd.DataFrame:
    """Return a row per test row and a column per method; a diverged run scores 0 on every row."""
    columns: dict[str, dict[tuple[str, int, str, str], float]] = {}
    for one in found:
        column = columns.setdefault(label_of(one.job), {})
        for client, scores in (one.scores or {}).items():
            for row, score in scores.items():
                column[one.job.scenario, one.job.seed, client, row] = score
    table = pd.DataFrame(columns)
    table.index.names = KEY
    table = table.sort_index()
    for one in found:
        if one.scores is None:
            table.loc[(one.job.scenario, one.job.seed), label_of(one.job)] = 0.0
    return table


def neighbors_table(found: Iterable[JobResult]) -> pd.DataFrame:
    """Count neighbours, all and those of the client's own task or house, in runs of `CHOOSING`.

    Numbers are means over clients and exchanges. Diverged runs are left out.
    """
    rows = []
    for one in found:
        if label_of(one.job) not in CHOOSING or one.scores is None:
            continue
        if one.neighbors is None:
            raise SystemExit(f"{one.job.name} has no neighbours: delete its result and run again.")
        house_of = SCENARIOS[one.job.scenario].house
        pairs = [
            (client, other)
            for exchange in one.neighbors
            for client, others in exchange.items()
            for other in others
        ]
        counts = (
            len(pairs),
            sum(task_of(a) == task_of(b) for a, b in pairs),
            sum(house_of(number_of(a)) == house_of(number_of(b)) for a, b in pairs),
        )
        mixtures = sum(map(len, one.neighbors))
        means = (round(count / mixtures, 3) for count in counts)
        rows.append([one.job.scenario, one.job.seed, one.job.method, *means])
    return pd.DataFrame(rows, columns=[*KEY[:2], "method", *NEIGHBORS])


def write_results(found: Sequence[JobResult], folder: Path = FOLDER) -> None:
    """Write the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    runs_table(found).to_csv(folder / "runs.csv", index=False, lineterminator="\n")
    write_scores(found, folder / "scores.csv.gz")
    neighbors_table(found).to_csv(folder / "neighbors.csv", index=False, lineterminator="\n")


def write_scores(found: Sequence[JobResult], path: Path) -> None:
    """Write the table of all scores."""
    text = scores_table(found).to_csv(float_format="%.4g", lineterminator="\n")
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
