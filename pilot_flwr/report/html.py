"""The report as one self-contained HTML page, and its figures as PNG files.

A folder that is not empty is written to only if it holds an earlier report, whose page lists its
figures; nothing but the earlier report's own files is replaced.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pilot_flwr import __version__
from pilot_flwr.errors import ConfigError
from pilot_flwr.report.style import Figure, Table, save_png
from pilot_flwr.run.atomic import write_text

PAGE = "index.html"
_GENERATOR = '<meta name="generator" content="pilot-flwr '
_SECTION = re.compile(r'^<section id="([^"]+)">$', re.MULTILINE)

_WITHOUT_PNG = {"scores", "settings"}
"""Sections without a figure."""


@dataclass(frozen=True)
class Page:
    """A report; text from a run is escaped when it is rendered."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Name and value of what the report is about."""

    warnings: Sequence[str]
    """What the reader must know before the figures."""

    figures: Sequence[Figure]
    tables: Sequence[Table] = ()
    """Tables of scores, above the figures, and `notes` below them."""

    notes: Sequence[str] = ()
    bold_last: bool = False
    """Whether a table's last row summarises those above."""

    files: Sequence[tuple[str, str]] = ()
    """Names and texts that are shown verbatim at the end."""

    files_title: str = "Settings and code"


def write_page(page: Page, folder: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write ``index.html`` and one PNG file per figure into a folder, and return the page's path.

    `say` gets a line of progress per figure.
    """
    earlier = earlier_pictures(folder)
    pictures = [figure for figure in page.figures if figure.panels]
    for figure in pictures:
        if (file := folder / f"{figure.name}.png").exists() and file not in earlier:
            raise ConfigError(
                f"{file} exists and does not belong to a report: move it, or give another folder "
                "with `--out`."
            )
        say(f"drawing {figure.name}")
        _ = [panel.png for panel in figure.panels]
    folder.mkdir(parents=True, exist_ok=True)
    for old in earlier:
        old.unlink(missing_ok=True)
    path = folder / PAGE
    write_text(path, render(page))  # first, because it lists the report's files
    for figure in pictures:
        save_png(figure, folder)
    return path


def earlier_pictures(folder: Path) -> list[Path]:
    """Return the PNG files that an earlier report wrote into a folder, none if it is empty."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise ConfigError(f"`--out` is {folder}, which is not a folder.")
    try:
        text = (folder / PAGE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    if _GENERATOR in text:
        names = [name for name in _SECTION.findall(text) if name not in _WITHOUT_PNG]
        return [file for name in names if (file := folder / f"{name}.png").is_file()]
    if any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty and holds no report of pilot-flwr, so nothing was written: "
            "give a new or empty folder with `--out`."
        )
    return []


def render(page: Page) -> str:
    """Return the page as HTML; text from a run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(page=page, version=__version__)
