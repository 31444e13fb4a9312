"""Compare compressed uploads with bfloat16 on the two scenarios: Pilot, five seeds, test split.

Run ``python benchmarks/scenarios/compression.py`` (about 20 minutes on 2 cores; repeat it to
resume) to update ``benchmarks/results/scenarios/compression-*.csv``, or ``--quick`` for a tiny run
that writes nothing. ``make tables`` writes the table of docs/explanation/results.md from them.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import ROOT, write_record

from scenarios.compare import QUICK
from scenarios.sweeps import FOLDER, PACKAGES, SCENARIOS, SEEDS, choice, sweep

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "compression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="jobs in parallel")
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
    write_record(FOLDER / "compression.json", {"side_by_side": options.jobs}, packages=PACKAGES)


if __name__ == "__main__":
    main()
