"""Record a run's events in its folder, and announce them in the ServerApp's log.

`EventRecorder` records the strategy's events and writes the tables after every exchange.
`Announcer` serves users who follow the run from another machine. Flower's command line shows a
ServerApp's log and nothing else, so progress travels as log lines after `MARK`, and the result, in
the last line, as JSON after `RESULT`; `read_announcement` parses them.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from pilot_flwr.algorithm.norm_bounds import NormCheck, too_few
from pilot_flwr.algorithm.server_state import Aggregation
from pilot_flwr.flower.codec import num_bytes
from pilot_flwr.formatting import one_line, plain
from pilot_flwr.protocol import LOSSES, EvaluationResult, Member, SessionResult
from pilot_flwr.run.aggregations import describe, write_matrices
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
)
from pilot_flwr.run.history import mean_over_tasks, task_scores, tasks_of
from pilot_flwr.run.outcome import RunResult
from pilot_flwr.run.progress import Progress
from pilot_flwr.run.tables import summary, timeline

logger = logging.getLogger("flwr")

MARK = "| "
RESULT = "Verdict: "
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) *: {3,}")


class EventRecorder:
    """Records the strategy's events in the run folder, and logs warnings."""

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
        self,
        server_round: int,
        members: Sequence[Member],
        stages: Mapping[str, int],
        available: Mapping[str, int] | None = None,
    ) -> None:
        """Record the clients and their stages; warn if a number of examples has changed.

        `available` counts each task's clients if `members` are a sample of them.
        """
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
        self.folder.record(
            RosterCalled(
                exchange=server_round,
                clients=tuple(clients),
                available=None if available is None else dict(available),
            )
        )

    def instruction(
        self,
        server_round: int,
        phase: str,
        member: Member,
        stage: int,
        content: RecordDict,
        *,
        asked: int,
    ) -> None:
        """Record the bytes sent to one of `asked` clients."""
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
                asked=asked,
            )
        )

    def training(
        self,
        server_round: int,
        member: Member,
        stage: int,
        result: SessionResult,
        content: RecordDict,
    ) -> None:
        """Record one client's training and the bytes of its reply."""
        assert result.training is not None
        training, up = result.training, num_bytes(content)
        self.folder.record(
            Trained(
                exchange=server_round,
                stage=stage,
                client=member.client,
                task=member.task,
                losses={name: training.losses.get(name) for name in LOSSES},
                examples=training.examples,
                steps=training.steps,
                seconds=training.seconds,
                gradients={str(group): n for group, n in training.gradients.items()},
                bytes_down=self._down[member.client],
                bytes_up=sum(up.values()),
                up=up,
                started=result.started,
                session_seconds=result.seconds,
                **({} if result.spent is None else asdict(result.spent)),
            )
        )
        if result.spent:
            logger.info(
                "Exchange %d, train, %s: ε = %.4g at δ = %g, uploads so far: %d.",
                server_round,
                member.client,
                *astuple(result.spent),
            )

    def evaluation(
        self, server_round: int, member: Member, result: EvaluationResult | None
    ) -> None:
        """Record the score, if any, of the model after exchange `server_round`."""
        if result is not None:
            client, task = member.client, member.task
            self.folder.record(
                Evaluated(exchange=server_round, client=client, task=task, **asdict(result))
            )

    def aggregation(self, server_round: int, done: Aggregation, seconds: float) -> None:
        """Write an aggregation's matrices, then record the event that names their file."""
        file = write_matrices(self.folder.path, server_round, done)
        self.folder.record(
            Aggregated(
                exchange=server_round,
                seconds=seconds,
                clients=len(done.clients),
                tasks={group: tuple(clients) for group, clients in done.tasks.items()},
                file=file,
                mixing=None if done.neighbors is None else describe(done.neighbors),
                truncation=done.truncation,
                method=self.method,
            )
        )

    def update_norms(self, server_round: int, checks: Sequence[NormCheck]) -> None:
        """Record every update's norm and bound; log those above it."""
        self._rejected = {c.client for c in checks if c.action == "rejected"}
        for c in checks:
            self.folder.record(NormChecked(exchange=server_round, reason=c.reason, **asdict(c)))
            if c.action == "rejected":
                self.failure(server_round, "train", c.client, f"Rejected: {c.reason}.")
            elif c.reason:
                logger.warning(
                    "Exchange %d, train, %s: %s; %s.", server_round, c.client, c.reason, c.action
                )
        if text := too_few(checks):
            logger.warning("Exchange %d, train: %s", server_round, text)

    def failure(
        self,
        server_round: int,
        phase: str,
        client: str,
        reason: str,
        *,
        received: RecordDict | None = None,
    ) -> None:
        """Record and log why a client's part is missing, with the bytes of a rejected reply."""
        reason = one_line(reason)
        logger.warning("Exchange %d, %s, %s: %s", server_round, phase, client, reason)
        up = None if received is None else num_bytes(received)
        self.folder.record(
            ClientFailed(exchange=server_round, phase=phase, client=client, reason=reason, up=up)
        )

    def warning(
        self, server_round: int, client: str, text: str, *, received: RecordDict | None = None
    ) -> None:
        """Record and log a warning about a client, with the bytes of a reply that is not used."""
        text = one_line(text)
        logger.warning("Exchange %d, %s: %s", server_round, client, text)
        up = None if received is None else num_bytes(received)
        self.folder.record(ClientWarning(exchange=server_round, client=client, text=text, up=up))

    def begin(self) -> None:
        """Mark the beginning of an attempt at an exchange."""
        self._began = len(self.folder.events)

    def repeat(self, server_round: int, reason: str) -> None:
        """Record and log that an exchange is repeated; the events of this attempt do not count."""
        logger.warning("%s The exchange is repeated.", reason)
        undone = len(self.folder.events) - self._began
        self.folder.record(ExchangeRepeated(exchange=server_round, reason=reason, undone=undone))

    def close(self, server_round: int, seconds: float) -> float | None:
        """Close an exchange; return the mean loss of the clients that sent one."""
        self.folder.record(
            ExchangeClosed(exchange=server_round, exchanges=self.num_exchanges, seconds=seconds)
        )
        self.write_tables()
        losses = [
            event.loss
            for event in self.folder.select(Trained, server_round)
            if event.client not in self._rejected and event.loss is not None
        ]
        return float(sum(losses) / len(losses)) if losses else None

    def close_evaluation(self, server_round: int, seconds: float) -> float | None:
        """Close the closing evaluation; return the mean of its scores over tasks."""
        self.folder.record(EvaluationClosed(exchange=server_round, seconds=seconds))
        self.write_tables()
        scores = task_scores(self.folder.events, server_round)
        return mean_over_tasks(scores, tasks_of(self.folder.events))

    def write_tables(self) -> None:
        """Write ``timeline.md`` and ``summary.md`` from all events."""
        self.folder.write("timeline.md", timeline(self.folder.events, self.method))
        self.folder.write("summary.md", summary(self.folder.events, self.tasks))

    def first_reason(self, server_round: int) -> str:
        """Return why the first missing client of an exchange is missing."""
        failures = self.folder.select(ClientFailed, server_round)
        return failures[0].reason if failures else "none"


class Announcer:
    """Announces a run in a log, line by line."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._progress = Progress()

    def event(self, event: Event) -> None:
        """Announce one event, unless its kind is not shown."""
        self._say(self._progress.lines(event))

    def end(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Announce the scores in a run folder, and its ``result.json``."""
        table = folder / "summary.md"
        if table.is_file():
            self._say(["", *table.read_text(encoding="utf-8").strip().splitlines()])
        self._log(RESULT + json.dumps(asdict(RunResult.of(folder, result))))

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._log(f"{MARK}{plain(line)}")


def read_announcement(line: str) -> str | RunResult | None:
    """Parse a line of Flower's log: a line of progress, the result, or None for anything else."""
    text = _LEVEL.sub("", plain(line), count=1)
    if text.startswith(MARK) or text == MARK.rstrip():
        return text[len(MARK) :]
    if not text.startswith(RESULT):
        return None
    try:
        values = json.loads(text.removeprefix(RESULT))
        values["reasons"] = tuple(map(str, values["reasons"]))
        found = RunResult(**values)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    kinds = (found.folder, str), (found.status, str), (found.error, str), (found.failures, int)
    return found if all(isinstance(value, kind) for value, kind in kinds) else None


def is_alarm(line: str) -> bool:
    """Return whether a log line is a warning or an error of Flower's logger."""
    level = _LEVEL.match(plain(line))
    return level is not None and level[1] not in ("DEBUG", "INFO")
