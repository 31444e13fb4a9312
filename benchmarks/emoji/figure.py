"""Draw every method's mean on the emoji federations: ``docs/assets/emoji.svg``.

python benchmarks/emoji/figure.py
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib as mpl
import pandas as pd
from _record import RESULTS, ROOT
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from emoji.analysis import EVERYWHERE, PILOT, effect, mean_score, select
from emoji.compare import read_scores
from emoji.curves import COMPARED
from emoji.search import METHODS
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
STYLES = {"same": "-", "other_task": "--"}
AXES = {
    "concepts": "concepts per client",
    "clients": "clients",
    "neighbors": "neighbours M",
}


def draw_methods(scores: pd.DataFrame, out: Path) -> None:
    """Draw one panel per scenario: a dot per method, with the interval of method − Pilot."""
    methods = [method for method in METHODS if method in scores][::-1]
    figure, panels = plt.subplots(1, len(EVERYWHERE), figsize=(10, 3.6), sharey=True, sharex=True)
    for panel, scenario in zip(panels, EVERYWHERE, strict=True):
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
    panels[0].set_xlim(left=0)
    figure.supxlabel(
        "mean score on concepts that only other clients train on; bars: 95 % interval of the "
        "difference to Pilot (line)",
        fontsize=9,
        color=INK,
    )
    _save(figure, out)


def draw_curves(points: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw one panel per scenario and curve: a line per method and kind of test example."""
    figure, panels = plt.subplots(
        len(COMPARED), len(AXES), figsize=(10, 5.2), sharey="row", sharex="col"
    )
    for across, scenario in zip(panels, COMPARED, strict=True):
        for panel, (curve, label) in zip(across, AXES.items(), strict=True):
            chosen = [p for p in points if (p["scenario"], p["curve"]) == (scenario, curve)]
            for (method, colour), (kind, style) in product(LINES.items(), STYLES.items()):
                found = [
                    (p["value"], mean)
                    for p in chosen
                    if p["method"] == method and (mean := mean_of_kind(p["mean"], kind)) is not None
                ]
                if found:
                    panel.plot(*zip(*found, strict=True), style, marker=".", color=colour)
            panel.set_title(TITLES[scenario], fontsize=10, color=INK)
            panel.set_xscale("log")
            values = sorted({p["value"] for p in chosen})
            panel.set_xticks(values, [str(value) for value in values])
            panel.minorticks_off()
            _plain(panel, grid="both")
            if scenario == COMPARED[-1]:
                panel.set_xlabel(label, color=INK)
    handles = [Line2D([], [], color=colour, label=method) for method, colour in LINES.items()]
    handles += [Line2D([], [], color=INK, ls=s, label=f"rows {k}") for k, s in STYLES.items()]
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), frameon=False, labelcolor=INK
    )
    _save(figure, out, bottom=0.06)


def mean_of_kind(scores: Mapping[str, Mapping[str, float]], kind: str) -> float | None:
    """Return the mean over tasks of a kind's scores; None if there are no such rows."""
    found = [of["score"] for name, of in scores.items() if name.endswith(f", {kind}")]
    return statistics.fmean(found) if found else None


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
    """Draw both figures."""
    mpl.rcParams |= {"svg.hashsalt": "emoji", "font.size": 9, "text.color": INK}
    mpl.rcParams |= {f"{axis}tick.color": INK for axis in "xy"}
    draw_methods(read_scores(), ASSETS / "emoji.svg")
    record = json.loads((RESULTS / "emoji" / "curves.json").read_text())
    draw_curves(record["results"]["points"], ASSETS / "emoji-curves.svg")


if __name__ == "__main__":
    main()
