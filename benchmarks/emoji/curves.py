"""Measure scores as concepts per client, clients and neighbours vary.

    python benchmarks/emoji/curves.py

writes ``benchmarks/results/emoji/curves.csv.gz``, the score of every test row with one seed, and
``curves.json``. The kinds' shares of the test rows vary along a curve, so the figure shows them
apart. Rates are those of `search`; nothing is tested here. The curves' federations are written into
``--data``.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import write_record

from emoji.compare import FOLDER, own_rate, write_scores
from emoji.federation import SCENARIOS, SIZE, write_federation
from emoji.runs import PACKAGES, Job, parser, run_all
from emoji.search import read_rates

COMPARED = ("tasks", "untold")
METHODS = {
    "concepts": ("local", "fedit", "fedavg_per_task", "pilot"),
    "clients": ("local", "fedit", "fedavg_per_task", "pilot", "pilot_auto"),
    "neighbors": ("pilot",),
}
SEEDS = (0,)
"""Seeds."""
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


def points() -> Iterator[Point]:
    """Yield all points."""
    for scenario in COMPARED:
        for curve, values in CURVES.items():
            yield from (Point(scenario, curve, v, m) for v in values for m in METHODS[curve])


def job(point: Point, seed: int) -> Job:
    """Return the job of a point."""
    overrides = own_rate(point.method, read_rates())
    name = point.scenario
    if point.value != DEFAULTS[point.curve]:
        if point.curve == "neighbors":
            overrides += (f"strategy.num_neighbors={point.value}",)
        else:
            name = f"{point.scenario}-{point.curve}{point.value}"
    return Job(name, seed, point.method, overrides)


def write_federations(out: Path) -> None:
    """Write the federations that the comparison does not have."""
    for scenario, curve, value, _ in points():
        if curve == "neighbors" or value == DEFAULTS[curve]:
            continue
        made, size = SCENARIOS[scenario], SIZE
        if curve == "concepts":
            size = value
        else:
            made = replace(made, clients_per_task=value // len(made.tasks))
        for seed in SEEDS:
            name = f"{scenario}-{curve}{value}"
            write_federation(out, name, made, split="test", seed=seed, size=size)


def main() -> None:
    """Run, and write the curves."""
    options = parser(__doc__).parse_args()
    write_federations(options.data)
    asked = dict.fromkeys(job(point, seed) for point in points() for seed in SEEDS)
    found = run_all(list(asked), options)
    write_scores(found, FOLDER / "curves.csv.gz")
    seconds = round(sum(one.seconds for one in found))
    write_record(
        FOLDER / "curves.json", {"runs": len(found), "seconds": seconds}, packages=PACKAGES
    )


if __name__ == "__main__":
    main()
