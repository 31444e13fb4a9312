"""The report as one HTML page that needs nothing else, and its figures as PNG files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pilot_flwr import __version__
from pilot_flwr.report.drawing import Figure, Table, save_png
from pilot_flwr.storage.tensors import write_text


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
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):  # of a report that was written before
        old.unlink()
    for figure in page.figures:
        if figure.panels:
            say(f"drawing {figure.name}")
            save_png(figure, folder)
    path = folder / "index.html"
    write_text(path, render(page))
    return path


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
