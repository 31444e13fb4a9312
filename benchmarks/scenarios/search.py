"""Search every method's learning rate on the validation split, with the same budget for each.

Every method that trains has five candidates of `train.lr_scale`, a factor of two apart, which
multiplies all its rates. For FedAdam the candidates are five server rates, at `train.lr_scale` 1.
All candidates run with one seed, and a method's best two with a second; the higher mean of both
seeds wins. A candidate whose training diverges ranks last. Scores are on validation scans, which
are in neither the training nor the test split. The training scans are those of the comparison; the
seeds, and so styles, questions and orders, are not.

Run ``python benchmarks/scenarios/search.py`` (47 minutes on 2 cores with other load; repeat it to
resume) to update ``benchmarks/scenarios/rates.json`` and the results behind it.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import write_record

from pilot_flwr.sweeps.results import DONE, OPEN, read_rows
from scenarios.sweeps import (
    FOLDER,
    METHODS,
    PACKAGES,
    RATES,
    SCENARIOS,
    Rates,
    by_rate,
    choice,
    sweep,
    sweep_parser,
)

SCALE, SERVER_RATE = "train.lr_scale", "strategy.server_optimizer.learning_rate"
CANDIDATES = {SCALE: (0.25, 0.5, 1, 2, 4), SERVER_RATE: (0.001, 0.003, 0.01, 0.03, 0.1)}
FIRST, SECOND = 100, 101
"""Seeds of all candidates, and of the finalists."""
FINALISTS = 2


def searched(method: str) -> str:
    """Return the setting to search for a method."""
    return SERVER_RATE if method == "fedadam" else SCALE


def trained_methods() -> list[str]:
    """Return the methods that have a learning rate."""
    return [method for method in METHODS if method != "zero_shot"]


def search(scenario: str, folder: Path, *, jobs: int) -> None:
    """Run all candidates with the first seed, and the finalists with the second."""
    common = "data.evaluate_on=validation"
    groups: dict[str, list[str]] = {}
    for method in trained_methods():
        groups.setdefault(searched(method), []).append(method)
    for setting, methods in groups.items():
        values = choice(setting, CANDIDATES[setting])
        words = (choice("strategy", methods), values, choice("seed", [FIRST]))
        sweep(folder, scenario, common, *words, jobs=jobs, may_fail=True)
    scores = read_scores(folder)
    for number in range(FINALISTS):
        finalists = {m: ranking(scores[m])[number] for m in trained_methods()}
        for override, methods in by_rate(finalists, trained_methods()).items():
            setting, _, value = override.partition("=")
            words = (choice("strategy", methods), choice(setting, [value]))
            words += (choice("seed", [SECOND]),)
            sweep(folder, scenario, common, *words, jobs=jobs, may_fail=True)


Scores = dict[str, dict[str, dict[int, float]]]
"""Method → override → seed → mean score over tasks."""


def read_scores(results: Path) -> Scores:
    """Return the scores of a search's ``results.csv``; a failed job scores minus infinity."""
    scores: Scores = {}
    for row in read_rows(results):
        if row["status"] != OPEN:
            found = scores.setdefault(row["method"], {}).setdefault(row["variant"], {})
            found[int(row["seed"])] = float(row["mean"]) if row["status"] == DONE else -math.inf
    return scores


def ranking(candidates: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Return the overrides by score with the first seed, best first; ties by lower rate."""
    return sorted(candidates, key=lambda c: (-candidates[c][FIRST], rate_of(c)))


def chosen(candidates: Mapping[str, Mapping[int, float]]) -> str:
    """Return the finalist with the best mean of both seeds; ties by lower rate."""
    finalists = ranking(candidates)[:FINALISTS]
    return min(finalists, key=lambda c: (-sum(candidates[c].values()), rate_of(c)))


def rate_of(override: str) -> float:
    """Return the value of an override."""
    return float(override.partition("=")[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, and write the chosen rates with their results."""
    options = sweep_parser(__doc__).parse_args(arguments)
    rates: Rates = {}
    new = not any((options.out / f"search-{scenario}").exists() for scenario in SCENARIOS)
    started = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for scenario in SCENARIOS:
        folder = options.out / f"search-{scenario}"
        search(scenario, folder, jobs=options.jobs)
        scores = read_scores(folder)
        rates[scenario] = {method: chosen(scores[method]) for method in trained_methods()}
        shutil.copyfile(folder / "results.csv", FOLDER / f"search-{scenario}.csv")
    took = round(time.perf_counter() - started, 1) if new else None
    write_record(
        FOLDER / "search.json",
        {"side_by_side": options.jobs, "wall_seconds": took},
        packages=PACKAGES,
    )
    RATES.write_text(json.dumps(rates, indent=2) + "\n")
    print(RATES.read_text())


if __name__ == "__main__":
    main()
