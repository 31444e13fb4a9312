"""Draw the emoji federations' pictures, every method's mean and the curves.

    python benchmarks/emoji/figure.py

writes ``emoji-houses.png``, ``emoji.svg`` and ``emoji-curves.svg`` into ``docs/assets``.
"""

import math
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib as mpl
import pandas as pd
from _record import ROOT
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from emoji.analysis import ALL_SCENARIOS, PILOT, effect, mean_score, select
from emoji.compare import FOLDER, read_scores
from emoji.curves import COMPARED, CURVES, SEED, Point, job, points
from emoji.federation import HOUSES, write_pictures
from emoji.search import METHODS, label_of
from emoji.tables import TITLES

ASSETS = ROOT / "docs" / "assets"
COLOURS = {PILOT: "#bc4c00", "pilot_auto": "#bc4c00"}
OTHERS, REFERENCES, INK = "#0969da", "#8c959f", "#59636e"
"""Readable on white and on dark pages."""
REFERENCE_METHODS = ("zero_shot", "local", "centralised")


LINES = {
    "local": REFERENCES,
    "fedit": OTHERS,
    "fedavg_per_task": "#1a7f37",
    PILOT: COLOURS[PILOT],
    "pilot_auto": "#bf8700",
}
"""Colours of the methods of the curves."""
FEWEST = 30
"""A point of the curves with fewer tested concepts is not drawn."""
STYLES = {"same": "-", "other_task": "--"}
AXES = {
    "concepts": "concepts per client",
    "clients": "clients",
    "neighbors": "neighbours M",
}


SHOWN = (
    "1f42f",
    "1f34e",
    "1f6f5",
    "1f960",
    "1f5dd",
    "26f4",
    "1f3a5",
    "1f993",
    "23f3",
    "1f408-200d-2b1b",
)
"""Concepts that `draw_houses` shows."""


def draw_houses(out: Path) -> None:
    """Draw some concepts, a row per house."""
    figure, rows = plt.subplots(len(HOUSES), len(SHOWN), figsize=(10, 3.1))
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        for panels, house in zip(rows, HOUSES, strict=True):
            for panel, concept in zip(panels, SHOWN, strict=True):
                panel.imshow(plt.imread(Path(folder) / house / f"{concept}.png"))
                panel.set_axis_off()
            panels[0].text(-0.2, 0.5, house, transform=panels[0].transAxes, ha="right", va="center")
    _save(figure, out)


def draw_methods(scores: pd.DataFrame, out: Path) -> None:
    """Draw one panel per scenario: a dot per method, with the interval of method − Pilot."""
    methods = [method for method in METHODS if method in scores][::-1]
    figure, panels = plt.subplots(
        1, len(ALL_SCENARIOS), figsize=(10, 3.6), sharey=True, sharex=True
    )
    for panel, scenario in zip(panels, ALL_SCENARIOS, strict=True):
        rows = select(scores, scenario)
        pilot = mean_score(rows, PILOT)
        panel.axvline(pilot, color=COLOURS[PILOT], linewidth=1, alpha=0.5)
        for place, method in enumerate(methods):
            mean = mean_score(rows, method)
            found = None if method == PILOT else effect(rows, method, PILOT)
            reference = method in REFERENCE_METHODS
            colour = COLOURS.get(method, REFERENCES if reference else OTHERS)
            panel.errorbar(
                mean, place, xerr=found.difference.half_width if found else None, fmt="o",
                color=colour, markersize=5, linewidth=1.5,
                markerfacecolor="none" if reference else colour,
            )  # fmt: skip
        panel.set_title(TITLES[scenario], fontsize=10, color=INK)
        _plain(panel, grid="y")
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_xlim(left=-0.03)
    figure.supxlabel(
        "mean score on concepts that only other clients train on; bars: 95 % interval of the "
        "difference from Pilot (line)",
        fontsize=9,
        color=INK,
    )
    _save(figure, out)


def draw_curves(scores: pd.DataFrame, out: Path) -> None:
    """Draw one panel per scenario and curve: a line per method and kind of test example."""
    figure, panels = plt.subplots(
        len(COMPARED), len(AXES), figsize=(10, 5.2), sharey="row", sharex="col"
    )
    for across, scenario in zip(panels, COMPARED, strict=True):
        for panel, (curve, label) in zip(across, AXES.items(), strict=True):
            for (method, colour), (kind, style) in product(LINES.items(), STYLES.items()):
                line = {
                    point.value: mean_at(scores, point, kind)
                    for point in points()
                    if point[:2] == (scenario, curve) and point.method == method
                }
                panel.plot(list(line), list(line.values()), style, marker=".", color=colour)
            panel.set_title(TITLES[scenario], fontsize=10, color=INK)
            panel.set_xscale("log")
            panel.set_xticks(CURVES[curve], [str(value) for value in CURVES[curve]])
            panel.minorticks_off()
            _plain(panel, grid="both")
            if scenario == COMPARED[-1]:
                panel.set_xlabel(label, color=INK)
    handles = [Line2D([], [], color=colour, label=method) for method, colour in LINES.items()]
    handles += [Line2D([], [], color=INK, ls=s, label=f"`{k}` examples") for k, s in STYLES.items()]
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), frameon=False, labelcolor=INK
    )
    _save(figure, out, bottom=0.06)


def mean_at(scores: pd.DataFrame, point: Point, kind: str) -> float:
    """Return the mean over tasks of a kind's rows; NaN with fewer than `FEWEST` concepts."""
    one = job(point)
    if label_of(one) not in scores or one.scenario not in scores.index.get_level_values("scenario"):
        return math.nan
    rows = select(scores, one.scenario, kind)
    rows = rows[rows.index.get_level_values("seed") == SEED]
    enough = rows.index.get_level_values("row").nunique() >= FEWEST
    return mean_score(rows, label_of(one)) if enough else math.nan


def _plain(panel: Any, *, grid: str) -> None:
    panel.grid(axis=grid, color=REFERENCES, alpha=0.25)
    panel.tick_params(length=0)
    for side in panel.spines.values():
        side.set_visible(False)


def _save(figure: Any, out: Path, *, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(out, transparent=True, metadata={"Date": None} if out.suffix == ".svg" else {})
    plt.close(figure)


def main() -> None:
    """Draw all figures."""
    mpl.rcParams |= {"svg.hashsalt": "emoji", "font.size": 9, "text.color": INK}
    mpl.rcParams |= {f"{axis}tick.color": INK for axis in "xy"}
    draw_houses(ASSETS / "emoji-houses.png")
    draw_methods(read_scores(FOLDER / "scores.csv.gz"), ASSETS / "emoji.svg")
    draw_curves(read_scores(FOLDER / "curves.csv.gz"), ASSETS / "emoji-curves.svg")


if __name__ == "__main__":
    main()
