"""What the ServerApp says in its log of a run, for whoever follows it from another machine.

Flower brings the ServerApp's log to its command line and nothing else, so the progress of a run
and its verdict travel as lines of it: progress as people read it, behind `MARK`, and the verdict,
as the last such line, as JSON behind `VERDICT`. Both are written and read here alone.

What the server writes down while a run goes on: one event per fact, at once.

Events are lines of ``metrics.jsonl``; the tables are made from them after every exchange.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from pilot_flwr.algorithm.norm_bounds import NormCheck, too_few
from pilot_flwr.algorithm.server_state import Aggregation
from pilot_flwr.flower.codec import num_bytes
from pilot_flwr.formatting import headline, one_line, plain
from pilot_flwr.protocol import LOSSES, Member, Report, Update
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import (
    Aggregated,
    AggregationMethod,
    ClientFailed,
    ClientWarning,
    Evaluated,
    EvaluationClosed,
    Event,
    ExchangeClosed,
    ExchangeRepeated,
    InstructionSent,
    NormChecked,
    RosterCalled,
    RosterEntry,
    Trained,
    mean_over_tasks,
    task_scores,
    tasks_of,
)
from pilot_flwr.run.progress import Progress
from pilot_flwr.run.tables import summary, timeline

MARK = "| "
VERDICT = "Verdict: "
SHOWN_FAILURES = 5
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) *: {3,}")


@dataclass(frozen=True)
class Announcement:
    """How a run ended, as its ServerApp saw it.

    Attributes
    ----------
    folder : str
        The run folder on the server.
    status : str
        ``completed`` or ``failed``.
    error : str
        What stopped the run, or nothing.
    failures : int
        Number of clients' failures over all exchanges.
    reasons : tuple of str
        The first few of them, a line each.
    seconds : float
        Of the whole run, as ``result.json`` has it.
    """

    folder: str
    status: str
    error: str
    failures: int
    reasons: tuple[str, ...]
    seconds: float

    @property
    def succeeded(self) -> bool:
        """Whether the run came to its end and no client failed in it."""
        return self.status == "completed" and not self.error and self.failures == 0


class Announcer:
    """Says in a log what happens in a run.

    Parameters
    ----------
    log : callable
        Takes one line.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._progress = Progress()

    def event(self, event: Event) -> None:
        """Announce one event of the run, if it has words."""
        self._say(self._progress.lines(event))

    def end(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Announce the scores in a run folder, and the verdict from its ``result.json``."""
        summary = folder / "summary.md"
        if summary.is_file():
            self._say(["", *summary.read_text(encoding="utf-8").strip().splitlines()])
        self._log(VERDICT + json.dumps(asdict(verdict(str(folder), result))))

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._log(f"{MARK}{plain(line)}")


def verdict(folder: str, result: Mapping[str, Any]) -> Announcement:
    """Return the verdict of a run from its ``result.json``."""
    failures = result["failures"]
    return Announcement(
        folder=folder,
        status=result["status"],
        error=result["error"] or "",
        failures=len(failures),
        reasons=tuple(describe_failure(row) for row in failures[:SHOWN_FAILURES]),
        seconds=result["seconds"],
    )


def describe_failure(row: Mapping[str, Any]) -> str:
    """Return one failure of ``result.json`` as a line."""
    return (
        f"Client {row.get('client', '?')} failed in exchange {row.get('round', '?')} "
        f"({row.get('phase', '?')}): {headline(str(row.get('reason', '')))}"
    )


def read(line: str) -> str | Announcement | None:
    """Return what a line of the log announces: progress, the verdict, or neither.

    The words of `Announcer` are found behind the level that Flower's logger puts in front. A line
    that only looks like a verdict is none.
    """
    text = _LEVEL.sub("", plain(line), count=1)
    if text.startswith(MARK) or text == MARK.rstrip():
        return text[len(MARK) :]
    if not text.startswith(VERDICT):
        return None
    try:
        values = json.loads(text.removeprefix(VERDICT))
        values["reasons"] = tuple(map(str, values["reasons"]))
        found = Announcement(**values)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    kinds = (found.folder, str), (found.status, str), (found.error, str), (found.failures, int)
    return found if all(isinstance(value, kind) for value, kind in kinds) else None


def is_alarm(line: str) -> bool:
    """Return whether a line of the log is a warning or an error of Flower's logger."""
    return bool(re.match(r"(WARNING|ERROR|CRITICAL) *: {3,}", plain(line)))


logger = logging.getLogger("flwr")


class EventRecorder:
    """Turns what the strategy sees into events.

    Parameters
    ----------
    folder : RunFolder
        Gets events and tables.
    num_exchanges : int
        R + 1.
    tasks : sequence of str
        In the order of the tables' rows.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        num_exchanges: int,
        tasks: Sequence[str],
        method: AggregationMethod,
    ) -> None:
        self.folder, self.num_exchanges, self.tasks = folder, num_exchanges, tuple(tasks)
        self.method = method
        self._down: dict[str, int] = {}
        self._began = 0
        self._rejected: set[str] = set()

    def roster(
        self, server_round: int, members: Sequence[Member], stages: Mapping[str, int]
    ) -> None:
        """Write down who takes part, and in which stage; log whose number of examples changed."""
        declared = {
            entry.client: entry.examples
            for event in self.folder.select(RosterCalled)
            for entry in event.clients
        }
        for m in members:
            if (before := declared.get(m.client, m.examples)) != m.examples:
                text = f"declares {m.examples} training examples, and declared {before} before."
                self.warning(server_round, m.client, text)
        clients = [RosterEntry(m.client, m.task, m.examples, stages[m.client]) for m in members]
        self.folder.record(RosterCalled(exchange=server_round, clients=tuple(clients)))

    def order(
        self, server_round: int, phase: str, member: Member, stage: int, content: RecordDict
    ) -> None:
        """Write down the bytes that go to a client, when they go."""
        down = num_bytes(content)
        self._down[member.client] = sum(down.values())
        self.folder.record(
            InstructionSent(
                exchange=server_round,
                phase=phase,
                client=member.client,
                task=member.task,
                stage=stage,
                down=down,
            )
        )

    def update(self, server_round: int, stage: int, update: Update, report: Report) -> None:
        """Write down one client's training and the bytes that came from it."""
        assert report.training is not None
        numbers = report.training
        privacy = report.privacy or {}
        self.folder.record(
            Trained(
                exchange=server_round,
                stage=stage,
                client=update.client,
                task=update.task,
                losses={name: numbers.get(f"loss.{name}") for name in LOSSES},
                examples=update.num_examples,
                steps=int(numbers["steps"]),
                seconds=numbers["seconds"],
                gradients=report.gradients,
                bytes_down=self._down[update.client],
                bytes_up=sum(report.sizes.values()),
                up=report.sizes,
                started=report.times["started"],
                session_seconds=report.times["turn_seconds"],
                epsilon=privacy.get("epsilon"),
                delta=privacy.get("delta"),
                releases=int(privacy["releases"]) if privacy else None,
            )
        )
        if report.privacy:
            logger.info(
                "Exchange %d, train, %s: ε = %.4g at δ = %g, uploads so far: %d.",
                server_round,
                update.client,
                *report.privacy.values(),
            )

    def evaluation(self, server_round: int, member: Member, report: Report) -> None:
        """Write down a score, if there is one, of the model after exchange `server_round`."""
        result = report.evaluation
        if result is None:
            return
        self.folder.record(
            Evaluated(
                exchange=server_round, client=member.client, task=member.task, **asdict(result)
            )
        )

    def aggregation(self, server_round: int, done: Aggregation, seconds: float) -> None:
        """Write down what the server's aggregation did."""
        self.folder.record(
            Aggregated(
                exchange=server_round,
                seconds=seconds,
                clients=len(done.clients),
                tasks={group: tuple(clients) for group, clients in done.tasks.items()},
                neighbors=done.neighbors,
                distances=done.distances,
                method=self.method,
            )
        )

    def update_norms(self, server_round: int, verdicts: Sequence[NormCheck]) -> None:
        """Write down every update's norm and bound, and log those above it."""
        self._rejected = {v.client for v in verdicts if v.action == "rejected"}
        for v in verdicts:
            self.folder.record(
                NormChecked(
                    exchange=server_round,
                    client=v.client,
                    action=v.action,
                    norms=v.norms,
                    bounds=v.bounds,
                    reason=v.reason,
                )
            )
            if v.action == "rejected":
                self.failure(server_round, "train", v.client, f"Rejected: {v.reason}.")
            elif v.reason:
                logger.warning(
                    "Exchange %d, train, %s: %s; %s.", server_round, v.client, v.reason, v.action
                )
        if text := too_few(verdicts):
            logger.warning("Exchange %d, train: %s", server_round, text)

    def warning(self, server_round: int, client: str, text: str) -> None:
        """Write down, and log, what is odd about a client that takes part all the same."""
        text = one_line(text)
        logger.warning("Exchange %d, %s: %s", server_round, client, text)
        self.folder.record(ClientWarning(exchange=server_round, client=client, text=text))

    def failure(
        self,
        server_round: int,
        phase: str,
        client: str,
        reason: str,
        *,
        received: RecordDict | None = None,
    ) -> None:
        """Write down, and log, that a client's part in a phase is missing, and why.

        `received` is a reply that was rejected: its bytes did travel.
        """
        reason = one_line(reason)
        logger.warning("Exchange %d, %s, %s: %s", server_round, phase, client, reason)
        up = None if received is None else num_bytes(received)
        self.folder.record(
            ClientFailed(exchange=server_round, phase=phase, client=client, reason=reason, up=up)
        )

    def begin(self) -> None:
        """Take note that an attempt at an exchange begins."""
        self._began = len(self.folder.events)

    def repeat(self, server_round: int, reason: str) -> None:
        """Write down, and log, that an exchange is repeated: what it recorded does not count."""
        logger.warning("%s The exchange is repeated.", reason)
        undone = len(self.folder.events) - self._began
        self.folder.record(ExchangeRepeated(exchange=server_round, reason=reason, undone=undone))

    def close(self, server_round: int, seconds: float) -> float | None:
        """End an exchange's train phase; return the mean loss of its clients that told it."""
        self.folder.record(
            ExchangeClosed(exchange=server_round, exchanges=self.num_exchanges, seconds=seconds)
        )
        self.write_tables()
        trained = self.folder.select(Trained, server_round)
        counted = [event.loss for event in trained if event.client not in self._rejected]
        losses = [loss for loss in counted if loss is not None]
        return float(sum(losses) / len(losses)) if losses else None

    def close_evaluation(self, server_round: int, seconds: float) -> float | None:
        """End the closing evaluation; return the mean over tasks of its scores."""
        self.folder.record(EvaluationClosed(exchange=server_round, seconds=seconds))
        self.write_tables()
        scores = task_scores(self.folder.events, server_round)
        return mean_over_tasks(scores, tasks_of(self.folder.events))

    def write_tables(self) -> None:
        """Write ``timeline.md`` and ``summary.md`` anew."""
        self.folder.write("timeline.md", timeline(self.folder.events))
        self.folder.write("summary.md", summary(self.folder.events, self.tasks))

    def reasons(self, server_round: int) -> list[str]:
        """Return why clients are missing in an exchange, first one first."""
        return [event.reason for event in self.folder.select(ClientFailed, server_round)]
