"""Measure scores as concepts per client, clients and neighbours vary.

    python benchmarks/emoji/curves.py

writes ``benchmarks/results/emoji/curves.csv.gz``, the score of every test row with one seed, and
``curves.json``. The share of each kind varies along a curve, so the figure has a line per
kind. One point, `SINGLE`, is repeated with other seeds and all methods. Rates are those of
`search`. The curves' federations are written into ``--data``.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import write_record

from emoji.analysis import NO_CT_MOA, NO_PRIVATE, NO_PSI_C, STAGE_1
from emoji.compare import FOLDER, write_scores
from emoji.federation import SCENARIOS, SIZE, write_federation
from emoji.federation import SEEDS as ALL_SEEDS
from emoji.runs import PACKAGES, Job, parser, run_all
from emoji.search import METHODS as ALL_METHODS
from emoji.search import job_of

COMPARED = ("tasks", "untold")
METHODS = {
    "concepts": ("local", "fedit", "fedavg_per_task", "pilot"),
    "clients": ("local", "fedit", "fedavg_per_task", "pilot", "pilot_auto"),
    "neighbors": ("pilot",),
}
SEED = 0
CURVES = {
    "concepts": (10, 30, 100, SIZE, 300),
    "clients": (3, 9, 27),
    "neighbors": (1, 2, 4, 8),
}
"""Curve → its values; those of `DEFAULTS` are runs of the comparison."""
DEFAULTS = {"concepts": SIZE, "clients": 9, "neighbors": 2}


class Point(NamedTuple):
    """A method's place on a curve."""

    scenario: str
    curve: str
    value: int
    method: str


SINGLE = "untold-clients3"
"""One client per task, where the curves show Pilot ahead: repeated with other seeds and methods."""
SINGLE_PARTS = (STAGE_1, NO_CT_MOA, NO_PSI_C, NO_PRIVATE)
"""Variants of Pilot that run beside all methods in `SINGLE`."""
SINGLE_SEEDS = [seed for seed in ALL_SEEDS["test"] if seed != SEED]


def points() -> Iterator[Point]:
    """Yield all points."""
    for scenario in COMPARED:
        for curve, values in CURVES.items():
            yield from (Point(scenario, curve, v, m) for v in values for m in METHODS[curve])


def job(point: Point) -> Job:
    """Return the job of a point."""
    label, name = point.method, point.scenario
    if point.value != DEFAULTS[point.curve]:
        if point.curve == "neighbors":
            label += f" strategy.num_neighbors={point.value}"
        else:
            name = f"{point.scenario}-{point.curve}{point.value}"
    return job_of(name, SEED, label)


def write_federations(out: Path) -> None:
    """Write the federations that the comparison does not have."""
    for scenario, curve, value, _ in points():
        if curve == "neighbors" or value == DEFAULTS[curve]:
            continue
        definition, size = SCENARIOS[scenario], SIZE
        if curve == "concepts":
            size = value
        else:
            definition = replace(definition, clients_per_task=value // len(definition.tasks))
        name = f"{scenario}-{curve}{value}"
        for seed in (SEED, *(SINGLE_SEEDS if name == SINGLE else ())):
            write_federation(out, name, definition, split="test", seed=seed, size=size)


def main() -> None:
    """Run, and write the curves."""
    options = parser(__doc__).parse_args()
    write_federations(options.data)
    asked = [job(point) for point in points()]
    asked += [
        job_of(SINGLE, seed, m) for m in (*ALL_METHODS, *SINGLE_PARTS) for seed in SINGLE_SEEDS
    ]
    found = run_all(list(dict.fromkeys(asked)), options)
    write_scores(found, FOLDER / "curves.csv.gz")
    seconds = round(sum(one.seconds for one in found))
    write_record(
        FOLDER / "curves.json", {"runs": len(found), "seconds": seconds}, packages=PACKAGES
    )


if __name__ == "__main__":
    main()
