"""The report of a run."""

from collections.abc import Callable
from pathlib import Path

from pilot_flwr.formatting import count, headline, human_seconds
from pilot_flwr.report.history import RunData, read_run
from pilot_flwr.report.html import Page, write_page
from pilot_flwr.report.matrices import distances, mixing_weights
from pilot_flwr.report.scores import learning_curves, losses
from pilot_flwr.report.style import Figure, Table
from pilot_flwr.report.timeline import time_line, traffic
from pilot_flwr.run.events import AggregationMethod, ClientFailed, ClientWarning, Resumed, select
from pilot_flwr.run.tables import summary_notes, summary_rows, timeline

FIGURES: tuple[Callable[[RunData], Figure], ...] = (
    learning_curves,
    time_line,
    losses,
    distances,
    mixing_weights,
    traffic,
)
"""Sections of the page; that of the router, which needs models, comes before the last one."""

_SHOWN_FAILURES = 5


def write_run_report(
    folder: Path, out: Path, *, router: bool = True, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the report of a run into the folder `out`, and return the page's path.

    `router` loads the base model to compute the router's probabilities; `say` gets lines of
    progress.
    """
    run = read_run(folder)
    figures = [figure(run) for figure in FIGURES]
    if router:
        from pilot_flwr.report.router import router_figures

        figures[-1:-1] = router_figures(run, say)
    else:
        text = "Left out because it loads the base model: `pilot-flwr report RUN` draws it."
        figures.insert(-1, Figure("router", "Router", text))
    return write_page(run_page(run, figures), out, say)


def run_page(run: RunData, figures: list[Figure]) -> Page:
    """Return the page of a run."""
    method = AggregationMethod.of(run.config.strategy)
    return Page(
        title=f"{run.config.strategy.name}: run {run.config.name}, seed {run.config.seed}",
        facts=_facts(run),
        warnings=_warnings(run),
        figures=figures,
        tables=[Table("Scores", summary_rows(run.events) or [["no evaluation"]])],
        bold_last=True,
        notes=summary_notes(run.events),
        files=[
            ("config.yaml: every setting", run.config_text),
            ("overrides.txt: the overrides that started the run", run.overrides or "no overrides"),
            ("code.json: commit and versions", _code(run)),
            ("timeline.md: the time line as a table", timeline(run.events, method)),
        ],
    )


def _facts(run: RunData) -> list[tuple[str, str]]:
    result = run.result
    status = "running, or ended without a result" if not result else str(result["status"])
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
        ("code", _code_line(run.code)),
        ("run folder", run.folder.absolute().name),
    ]


def _code_line(code: dict[str, object]) -> str:
    """Return the commit and versions of ``code.json``."""
    commit = code.get("commit")
    text = f"commit {commit}" if commit else "commit unknown: not run from a git checkout"
    if code.get("changed"):
        text += ", with uncommitted changes"
    versions = code.get("versions")
    shown = versions if isinstance(versions, dict) else {}
    named = [f"{name} {shown[name]}" for name in ("python", "flwr", "torch") if shown.get(name)]
    return ", ".join([text, *named])


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
    failures = select(run.events, ClientFailed)
    lines += [event.line for event in failures[:_SHOWN_FAILURES]]
    if len(failures) > _SHOWN_FAILURES:
        lines.append(f"And {count(len(failures) - _SHOWN_FAILURES, 'more failure')}.")
    lines += [f"{event.client}: {event.text}" for event in select(run.events, ClientWarning)]
    if resumed := len(select(run.events, Resumed)):
        lines.append(f"The run was interrupted and resumed {count(resumed, 'time')}.")
    return lines
