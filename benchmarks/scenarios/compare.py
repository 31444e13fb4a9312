"""Compare all methods, and Pilot's ablations, on the two scenarios: five seeds, test split.

Every method uses the learning rate that ``search.py`` chose for it on validation scans
(``rates.json``); ablations use Pilot's. Run
``python benchmarks/scenarios/compare.py`` (about an hour on 2 cores; repeat it to resume) to update
``benchmarks/results/scenarios/*.csv``. ``--quick`` runs two methods at a tiny size and writes
nothing.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import write_record

from scenarios.sweeps import (
    ABLATIONS,
    FOLDER,
    METHODS,
    PACKAGES,
    SCENARIOS,
    SEEDS,
    by_rate,
    choice,
    read_rates,
    sweep,
    sweep_parser,
)

QUICK = (
    "data.train_examples=8", "data.test_examples=2", "data.clients_per_task=1", "strategy.rounds=1",
    "evaluation.max_new_tokens=2",
)  # fmt: skip


def compare(
    scenario: str,
    folder: Path,
    methods: Sequence[str],
    *more: str,
    jobs: int,
    seeds: Sequence[int] = SEEDS,
) -> None:
    """Run methods on a scenario, each with its learning rate."""
    rates = read_rates()[scenario]
    rates |= {ablation: rates["pilot"] for ablation in ABLATIONS}
    for override, group in by_rate(rates, methods).items():
        words = [choice("strategy", group), *filter(None, [override]), choice("seed", seeds)]
        sweep(folder, scenario, *words, *more, jobs=jobs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and copy the results into ``benchmarks/results``."""
    parser = sweep_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, write nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        with tempfile.TemporaryDirectory() as name:
            chosen = ("zero_shot", "pilot")
            compare(SCENARIOS[0], Path(name) / "quick", chosen, *QUICK, jobs=1, seeds=[0])
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    new = not any((options.out / scenario).exists() for scenario in SCENARIOS)
    started = time.perf_counter()
    for methods in (METHODS, ABLATIONS):
        for scenario in SCENARIOS:
            folder = options.out / scenario
            compare(scenario, folder, methods, jobs=options.jobs)
            shutil.copyfile(folder / "results.csv", FOLDER / f"{scenario}.csv")
    took = round(time.perf_counter() - started, 1) if new else None
    write_record(
        FOLDER / "compare.json",
        {"side_by_side": options.jobs, "wall_seconds": took},
        packages=PACKAGES,
    )


if __name__ == "__main__":
    main()
