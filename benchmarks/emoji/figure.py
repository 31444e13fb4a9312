"""Draw every method's mean on the emoji federations: ``docs/assets/emoji.svg``.

python benchmarks/emoji/figure.py
"""

import sys
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib as mpl
import pandas as pd
from _record import ROOT
from matplotlib import pyplot as plt

from emoji.analysis import EVERYWHERE, PILOT, effect, mean_score, select
from emoji.compare import read_scores
from emoji.search import METHODS
from emoji.tables import TITLES

OUT = ROOT / "docs" / "assets" / "emoji.svg"
COLOURS = {PILOT: "#bc4c00", "pilot_auto": "#bc4c00"}
OTHERS, REFERENCES, INK = "#0969da", "#8c959f", "#59636e"
"""Readable on white and on dark pages."""
REFERENCE_METHODS = ("zero_shot", "local", "centralised")


def draw(scores: pd.DataFrame, out: Path = OUT) -> None:
    """Draw one panel per scenario: a dot per method, with the interval of method − Pilot."""
    mpl.rcParams |= {"svg.hashsalt": "emoji", "font.size": 9, "text.color": INK}
    mpl.rcParams |= {f"{axis}tick.color": INK for axis in "xy"}
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
        panel.grid(axis="y", color=REFERENCES, alpha=0.25)
        panel.tick_params(length=0)
        for side in panel.spines.values():
            side.set_visible(False)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_xlim(left=0)
    figure.supxlabel(
        "mean score on concepts that only other clients train on; bars: 95 % interval of the "
        "difference to Pilot (line)",
        fontsize=9,
        color=INK,
    )
    figure.tight_layout()
    figure.savefig(out, transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(read_scores())
