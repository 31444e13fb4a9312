"""Compare compressed uploads with bfloat16 on the two scenarios: Pilot, five seeds, test split.

The learning rate is Pilot's, from the search of the comparison of methods, which is the default.
Run ``python benchmarks/scenarios/compression.py`` (an hour on 2 cores; repeat it to resume) to
update ``benchmarks/results/scenarios/compression-*.csv``, then
``python benchmarks/tables.py --readme`` to update the table of docs/explanation/results.md.
``--quick`` makes a tiny run and writes nothing.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import write_record

from scenarios.compare import QUICK
from scenarios.sweeps import FOLDER, PACKAGES, SCENARIOS, SEEDS, choice, sweep, sweep_parser

DTYPES = ("bfloat16", "int8", "int4")
"""Values of `model.sent_dtype`; the first is the baseline."""


def compare(
    scenario: str, folder: Path, *more: str, jobs: int, seeds: Sequence[int] = SEEDS
) -> None:
    """Run Pilot with every type of upload."""
    words = [choice("model.sent_dtype", DTYPES), choice("seed", seeds)]
    sweep(folder, scenario, *words, *more, jobs=jobs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and copy the results into ``benchmarks/results``."""
    parser = sweep_parser(__doc__, folder="compression")
    parser.add_argument("--quick", action="store_true", help="tiny, write nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        with tempfile.TemporaryDirectory() as name:
            compare(SCENARIOS[0], Path(name) / "quick", *QUICK, jobs=1, seeds=[0])
        return
    for scenario in SCENARIOS:
        folder = options.out / scenario
        compare(scenario, folder, jobs=options.jobs)
        shutil.copyfile(folder / "results.csv", FOLDER / f"compression-{scenario}.csv")
    results = {"side_by_side": options.jobs, "wall_seconds": None}  # parts may be resumed ones
    write_record(FOLDER / "compression.json", results, packages=PACKAGES)


if __name__ == "__main__":
    main()
