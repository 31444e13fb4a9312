"""The report as one HTML page that needs nothing else, and its figures as PNG files.

A folder that is not empty is written to only if it holds an earlier report, and of that only what
the report itself wrote is replaced: its page says which figures it has.
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
"""Sections that are no figures."""


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes
    ----------
    title : str
        Its heading.
    facts : sequence of (str, str)
        What it is about: name and value.
    warnings : sequence of str
        What the reader must know before the figures.
    figures : sequence of Figure
        Sections, in order.
    tables : sequence of Table
        Tables of scores, above the figures.
    files : sequence of (str, str)
        Names and texts that are shown word by word at the end.
    notes : sequence of str
        Below the tables.
    bold_last : bool
        Whether the last row of a table is a summary of those above.
    files_title : str
        Heading of the files.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    figures: Sequence[Figure]
    tables: Sequence[Table] = ()
    files: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    bold_last: bool = False
    files_title: str = "Settings and code"


def write_page(page: Page, folder: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write ``index.html`` and one PNG file per figure.

    Parameters
    ----------
    page : Page
        The report.
    folder : Path
        Made if it does not exist.
    say : callable
        Gets a line per figure.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ConfigError
        The folder has files that no report wrote where this one would write.
    """
    earlier = earlier_pictures(folder)
    pictures = [figure for figure in page.figures if figure.panels]
    for figure in pictures:
        if (file := folder / f"{figure.name}.png").exists() and file not in earlier:
            raise ConfigError(
                f"{file} is there already and of no report: move it away, or give another folder "
                "with `--out`."
            )
        say(f"drawing {figure.name}")
        _ = [panel.png for panel in figure.panels]
    folder.mkdir(parents=True, exist_ok=True)
    for old in earlier:
        old.unlink(missing_ok=True)
    path = folder / PAGE
    write_text(path, render(page))  # first, as it says which files are the report's
    for figure in pictures:
        save_png(figure, folder)
    return path


def earlier_pictures(folder: Path) -> list[Path]:
    """Return the PNG files that an earlier report wrote into a folder, none if it is empty.

    Raises
    ------
    ConfigError
        It is no folder, or it is not empty and holds no report.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise ConfigError(f"`--out` is {folder}, which is no folder.")
    try:
        text = (folder / PAGE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    if _GENERATOR in text:
        names = [name for name in _SECTION.findall(text) if name not in _WITHOUT_PNG]
        return [file for name in names if (file := folder / f"{name}.png").is_file()]
    if any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty and holds no report of pilot-flwr, so it is left as it is: "
            "give a new or an empty folder with `--out`."
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


def cells_of(markdown: str) -> list[list[str]]:
    """Return the cells of a Markdown table, header first, without marks of bold type."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return [row for number, row in enumerate(cells) if number != 1]  # 1: the rule below the header
