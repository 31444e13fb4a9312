"""The report of a run."""

import json
from collections.abc import Callable
from pathlib import Path

from pilot_flwr.formatting import count, headline, human_seconds
from pilot_flwr.report.matrices import distances, mixing_weights
from pilot_flwr.report.page import Figure, Page, Table, write_page
from pilot_flwr.report.router import router_figures
from pilot_flwr.report.scores import learning_curves, losses
from pilot_flwr.report.timeline import time_line, traffic
from pilot_flwr.run.events import AggregationMethod, ClientFailed, ClientWarning, Resumed, select
from pilot_flwr.run.history import RunData, read_run
from pilot_flwr.run.tables import summary_notes, summary_rows, timeline

FIGURES: tuple[Callable[[RunData], Figure], ...] = (
    learning_curves,
    time_line,
    losses,
    distances,
    mixing_weights,
    traffic,
)
"""Sections of the page; the router's, which needs the models, comes before the last."""

_SHOWN_FAILURES = 5


def write_run_report(
    folder: Path, out: Path, *, router: bool = True, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the report of a run into the folder `out`, and return the page's path.

    `router` loads the base model to compute the router's probabilities; `say` receives lines of
    progress.
    """
    run = read_run(folder)
    figures = [figure(run) for figure in FIGURES]
    text = "Omitted, because it loads the base model; `pilot-flwr report RUN` draws it."
    omitted = [Figure("router", "Router", text)]
    figures[-1:-1] = router_figures(run, say) if router else omitted
    return write_page(run_page(run, figures), out, say)


def run_page(run: RunData, figures: list[Figure]) -> Page:
    """Return the page of a run."""
    method = AggregationMethod.of(run.config.strategy)
    status = str(run.result.get("status")) if run.result else "running, or ended without a result"
    if run.result.get("seconds") is not None:
        status += f" after {human_seconds(float(run.result['seconds']))}"
    tasks = ", ".join(f"{task} ({len(run.clients(task))})" for task in run.tasks)
    code = json.dumps(run.code, indent=2) if run.code else "This run folder has no code.json."
    closed = sum(exchange.seconds is not None for exchange in run.exchanges)
    return Page(
        title=f"{run.config.strategy.name}: run {run.config.name}, seed {run.config.seed}",
        facts=[
            ("method", run.config.strategy.name),
            ("status", status),
            ("clients per task", tasks or "none so far"),
            ("exchanges", f"{closed} of {run.config.strategy.rounds + 1}"),
            ("base model", run.config.model.path),
            ("seed", str(run.config.seed)),
            ("code", _code_line(run.code)),
            ("run folder", run.folder.absolute().name),
        ],
        warnings=_warnings(run),
        figures=figures,
        tables=[Table("Scores", summary_rows(run.events) or [["no evaluation"]])],
        bold_last=True,
        notes=summary_notes(run.events),
        files=[
            ("config.yaml: every setting", run.config_text),
            ("overrides.txt: the overrides that started the run", run.overrides or "no overrides"),
            ("code.json: commit and versions", code),
            ("timeline.md: the timeline as a table", timeline(run.events, method)),
        ],
    )


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
