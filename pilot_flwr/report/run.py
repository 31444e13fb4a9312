"""The report of a run."""

from collections.abc import Callable
from pathlib import Path

from pilot_flwr.formatting import count, headline, human_seconds
from pilot_flwr.report.history import RunData, read_run
from pilot_flwr.report.html import Page, cells_of, write_page
from pilot_flwr.report.matrices import distances, mixing_weights
from pilot_flwr.report.scores import learning_curves, losses
from pilot_flwr.report.style import Figure, Table
from pilot_flwr.report.timeline import time_line, traffic
from pilot_flwr.run.directory import select
from pilot_flwr.run.tables import summary, timeline

FIGURES: tuple[Callable[[RunData], Figure], ...] = (
    learning_curves,
    time_line,
    losses,
    distances,
    mixing_weights,
    traffic,
)
"""Sections of the page; that of the router, which needs models, comes behind them."""

ROUTER_TITLE = "Router"
LEFT_OUT = (
    "Left out, because the base model has to be loaded for it: `pilot-flwr report RUN` draws it."
)
_SHOWN_FAILURES = 5


def write_run_report(
    folder: Path, out: Path, *, router: bool = True, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the report of a run.

    Parameters
    ----------
    folder : Path
        The run folder.
    out : Path
        Gets ``index.html`` and the PNG files.
    router : bool
        Whether the router's probabilities are computed, which loads the base model.
    say : callable
        Gets lines of progress.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    PilotError
        The folder cannot be read as a run's.
    """
    run = read_run(folder)
    figures = [figure(run) for figure in FIGURES]
    if router:
        from pilot_flwr.report.router import router_figures

        figures[5:5] = router_figures(run, say)
    else:
        figures.insert(5, Figure("router", ROUTER_TITLE, LEFT_OUT))
    return write_page(run_page(run, figures), out, say)


def run_page(run: RunData, figures: list[Figure]) -> Page:
    """Put the page of a run together."""
    return Page(
        title=f"{run.config.strategy.name}: run {run.config.name}, seed {run.config.seed}",
        facts=_facts(run),
        warnings=_warnings(run),
        figures=figures,
        tables=[_scores(run)],
        bold_last=True,
        notes=[line for line in summary(run.events).splitlines() if line and line[0] != "|"],
        files=[
            ("config.yaml: every setting", run.config_text),
            ("overrides.txt: what the run was started with", run.overrides or "no overrides"),
            ("code.json: commit and versions", _code(run)),
            ("timeline.md: the time line as a table", timeline(run.events)),
        ],
    )


def _facts(run: RunData) -> list[tuple[str, str]]:
    result = run.result
    status = "still going on, or ended without a result" if not result else str(result["status"])
    if result.get("seconds") is not None:
        status += f" after {human_seconds(float(result['seconds']))}"
    tasks = ", ".join(f"{task} ({len(run.clients(task))})" for task in run.tasks)
    closed = sum(exchange.seconds is not None for exchange in run.exchanges)
    exchanges = f"{closed} of {run.config.strategy.rounds + 1}"
    return [
        ("method", run.config.strategy.name),
        ("status", status),
        ("clients per task", tasks or "none seen"),
        ("exchanges", exchanges),
        ("base model", run.config.model.path),
        ("seed", str(run.config.seed)),
        ("code", code_words(run.code)),
        ("run folder", run.folder.absolute().name),
    ]


def code_words(code: dict[str, object]) -> str:
    """Say which commit and versions ``code.json`` names."""
    commit = code.get("commit")
    words = f"commit {commit}" if commit else "commit unknown: not run from a git checkout"
    if code.get("changed"):
        words += ", with changes that are not committed"
    versions = code.get("versions")
    shown = versions if isinstance(versions, dict) else {}
    named = [f"{name} {shown[name]}" for name in ("python", "flwr", "torch") if shown.get(name)]
    return ", ".join([words, *named])


def _code(run: RunData) -> str:
    if not run.code:
        return "This run folder has no code.json."
    versions = run.code.get("versions") or {}
    lines = [f"commit: {run.code.get('commit')}", f"uncommitted changes: {run.code.get('changed')}"]
    return "\n".join([*lines, *(f"{name}: {version}" for name, version in versions.items())])


def _warnings(run: RunData) -> list[str]:
    lines = []
    if run.result.get("error"):
        lines.append(f"The run stopped: {headline(str(run.result['error']))}")
    failures = select(run.events, "failure")
    lines += [
        f"{e['client']} failed in exchange {e['round']} ({e['phase']}): {headline(e['reason'])}"
        for e in failures[:_SHOWN_FAILURES]
    ]
    if len(failures) > _SHOWN_FAILURES:
        lines.append(f"And {count(len(failures) - _SHOWN_FAILURES, 'more failure')}.")
    lines += [f"{e['client']}: {e['text']}" for e in select(run.events, "warning")]
    resumed = len(select(run.events, "resume"))
    if resumed:
        lines.append(f"The run was interrupted and resumed {count(resumed, 'time')}.")
    return lines


def _scores(run: RunData) -> Table:
    """Return the table of ``summary.md``."""
    return Table("Scores", cells_of(summary(run.events)) or [["no evaluation"]])
