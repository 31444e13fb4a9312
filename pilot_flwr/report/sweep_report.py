"""The report of a sweep: tables, a dot for every seed, and learning curves per method.

It needs ``results.csv`` alone; without the jobs' run folders it has no learning curves.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pilot_flwr.report.drawing import Table
from pilot_flwr.report.page import Page, cells_of, write_page
from pilot_flwr.report.sweep_curves import curves
from pilot_flwr.report.sweep_dots import dots
from pilot_flwr.sweeping.rows import DONE, SCORE, read_rows
from pilot_flwr.sweeping.table import Comparison, compare
from pilot_flwr.sweeping.writing import as_markdown
from pilot_flwr.wording import count, human_seconds

Row = Mapping[str, str]

RESULTS = "results.csv"
_SHOWN_FAILURES = 10


def is_sweep(path: Path) -> bool:
    """Return whether a path is a sweep's folder, or a ``results.csv`` of one."""
    return (path / RESULTS).is_file() or (path.is_file() and path.suffix == ".csv")


def write_sweep_report(
    path: Path,
    out: Path,
    *,
    baseline: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the report of a sweep.

    Parameters
    ----------
    path : Path
        The sweep's folder, or a ``results.csv``.
    out : Path
        Gets ``index.html`` and the PNG files.
    baseline : str, optional
        Method that all others are compared with in the table.
    say : callable
        Gets lines of progress.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    PilotError
        There are no results, or none with scores.
    """
    rows = read_rows(path)
    comparisons = compare(rows, baseline)
    runs = path / "runs" if path.is_dir() else path.parent / "runs"
    figures = []
    for number, comparison in enumerate(comparisons):
        mine = [row for row in rows if _belongs(row, comparison)]
        end = f"-{number + 1}" if len(comparisons) > 1 else ""
        about = f": {_title(comparison)}" if len(comparisons) > 1 else ""
        figures.append(dots(comparison, mine, end, about))
        figures.append(curves(comparison, mine, runs, end, about))
    page = Page(
        title=f"Sweep: {', '.join(dict.fromkeys(row['name'] for row in rows))}",
        facts=_facts(path, rows),
        warnings=_warnings(rows),
        figures=figures,
        tables=[Table(_title(c), cells_of(as_markdown(c, costs=True))) for c in comparisons],
        notes=_legend(comparisons),
        files=[(f"{RESULTS}: a row per job", (_csv(path)).read_text(encoding="utf-8"))],
        files_title="Results",
    )
    return write_page(page, out, say)


def _belongs(row: Row, comparison: Comparison) -> bool:
    """Return whether a row is one of those that a comparison was made of."""
    split = row.get("evaluated_on", "")
    title = row["name"] + (f", {split} split" if split else "")
    tasks = {key.removeprefix(SCORE) for key, v in row.items() if key.startswith(SCORE) and v}
    return row["status"] == DONE and title == comparison.title and tasks == set(comparison.tasks)


def _title(comparison: Comparison) -> str:
    return f"{comparison.title} ({', '.join(comparison.tasks)})"


def _facts(path: Path, rows: Sequence[Row]) -> list[tuple[str, str]]:
    done = [row for row in rows if row["status"] == DONE]
    commits = dict.fromkeys(row["commit"] or "unknown" for row in done)
    changed = any(row["changed"] == "true" for row in done)
    seconds = sum(float(row["seconds"]) for row in done if row["seconds"])
    return [
        ("jobs", f"{len(done)} of {len(rows)} done, {human_seconds(seconds)} of running in all"),
        ("seeds", ", ".join(dict.fromkeys(row["seed"] for row in done))),
        ("engine", ", ".join(dict.fromkeys(row["engine"] for row in done))),
        ("commit", ", ".join(commits) + (", with changes not committed" if changed else "")),
        ("versions", "; ".join(dict.fromkeys(row["versions"] for row in done))),
        ("results", f"{_csv(path).absolute().parent.name}/{RESULTS}"),
    ]


def _warnings(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row["status"] != DONE]
    lines = [f"{row['job']}: {row['error'] or row['status']}" for row in failed[:_SHOWN_FAILURES]]
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"And {count(len(failed) - _SHOWN_FAILURES, 'more job')} without scores.")
    commits = {row["commit"] for row in rows if row["status"] == DONE}
    if len(commits) > 1:
        lines.append("The jobs were run by different commits of the code; see results.csv.")
    return lines


def _legend(comparisons: Sequence[Comparison]) -> list[str]:
    lines = [line for c in comparisons for line in as_markdown(c).splitlines()[2:]]
    return list(dict.fromkeys(line for line in lines if line and line[0] != "|"))


def _csv(path: Path) -> Path:
    return path / RESULTS if path.is_dir() else path
