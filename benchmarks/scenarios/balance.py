"""Compare the reductions of Pilot's load-balancing loss on the two scenarios.

`train.balance_loss.reduction` is ``pooled`` or ``per_image``, all else equal; scores are on
validation scans, with seeds that neither the search nor the comparison of methods uses. Run
``python benchmarks/scenarios/balance.py`` (20 runs, about 10 minutes on 2 cores; repeat it to
resume) to update ``benchmarks/results/scenarios/balance.json``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import write_record

from pilot_flwr.sweeps.results import DONE, read_rows
from scenarios.sweeps import FOLDER, PACKAGES, SCENARIOS, choice, sweep, sweep_parser

SETTING = "train.balance_loss.reduction"
REDUCTIONS = ("pooled", "per_image")
SEEDS = (200, 201, 202, 203, 204)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both reductions on both scenarios, and write their scores by seed."""
    options = sweep_parser(__doc__).parse_args(arguments)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for scenario in SCENARIOS:
        folder = options.out / f"balance-{scenario}"
        words = (choice(SETTING, REDUCTIONS), choice("seed", SEEDS))
        sweep(folder, scenario, "data.evaluate_on=validation", *words, jobs=options.jobs)
        found = scores[scenario] = {reduction: {} for reduction in REDUCTIONS}
        for row in read_rows(folder):
            if row["status"] == DONE:
                reduction = row["variant"].rpartition("=")[2]
                found[reduction][row["seed"]] = round(float(row["mean"]), 4)
    results = {"side_by_side": options.jobs, "score": scores}
    write_record(FOLDER / "balance.json", results, packages=PACKAGES)


if __name__ == "__main__":
    main()
