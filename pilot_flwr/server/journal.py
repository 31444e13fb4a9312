"""What the server writes down while a run goes on: one event per fact, at once.

Events are lines of ``metrics.jsonl``; the tables are made from them after every exchange.
"""

import logging
from collections.abc import Mapping, Sequence

from flwr.app import RecordDict

from pilot_flwr.flower import replies
from pilot_flwr.flower.codec import num_bytes
from pilot_flwr.server.norm_check import Verdict, too_few
from pilot_flwr.server.state import Aggregation, Member, Update
from pilot_flwr.server.tables import summary, timeline
from pilot_flwr.storage.run_folder import RunFolder
from pilot_flwr.wording import one_line

logger = logging.getLogger("flwr")


LOSS_PARTS = ("ce", "difference", "balance", "z", "proximal")


class Journal:
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

    def __init__(self, folder: RunFolder, *, num_exchanges: int, tasks: Sequence[str]) -> None:
        self.folder, self.num_exchanges, self.tasks = folder, num_exchanges, tuple(tasks)
        self._down: dict[str, int] = {}
        self._began = 0
        self._rejected: set[str] = set()

    def roster(
        self, server_round: int, members: Sequence[Member], stages: Mapping[str, int]
    ) -> None:
        """Write down who takes part, and in which stage; log whose number of examples changed."""
        declared = {
            c["client"]: c["examples"] for e in self.folder.select("roster") for c in e["clients"]
        }
        for m in members:
            if (before := declared.get(m.client, m.examples)) != m.examples:
                text = f"declares {m.examples} training examples, and declared {before} before."
                self.warning(server_round, m.client, text)
        clients = [
            {"client": m.client, "task": m.task, "examples": m.examples, "stage": stages[m.client]}
            for m in members
        ]
        self.folder.record("roster", round=server_round, clients=clients)

    def order(
        self, server_round: int, phase: str, member: Member, stage: int, content: RecordDict
    ) -> None:
        """Write down the bytes that go to a client, when they go."""
        down = num_bytes(content)
        self._down[member.client] = sum(down.values())
        self.folder.record(
            "order",
            round=server_round,
            phase=phase,
            client=member.client,
            task=member.task,
            stage=stage,
            down=down,
        )

    def update(self, server_round: int, stage: int, update: Update, report: replies.Report) -> None:
        """Write down one client's training and the bytes that came from it."""
        assert report.training is not None
        numbers = report.training
        self.folder.record(
            "train",
            round=server_round,
            stage=stage,
            client=update.client,
            task=update.task,
            loss=numbers.get("loss.total"),
            **{f"loss_{n}": numbers.get(f"loss.{n}") for n in LOSS_PARTS},
            examples=update.num_examples,
            steps=numbers["steps"],
            seconds=numbers["seconds"],
            gradients=report.gradients,
            bytes_down=self._down[update.client],
            bytes_up=sum(report.sizes.values()),
            up=report.sizes,
            **report.times,
            **(report.privacy or {}),
        )
        if report.privacy:
            logger.info(
                "Exchange %d, train, %s: ε = %.4g at δ = %g, uploads so far: %d.",
                server_round,
                update.client,
                *report.privacy.values(),
            )

    def evaluation(self, server_round: int, member: Member, report: replies.Report) -> None:
        """Write down a score, if there is one, of the model after exchange `server_round`."""
        result = report.evaluation
        if result is None:
            return
        self.folder.record(
            "evaluate",
            round=server_round,
            client=member.client,
            task=member.task,
            score=result.score,
            metric=result.metric,
            approximate=result.approximate,
            cut=result.cut,
            examples=result.examples,
            seconds=result.seconds,
        )

    def aggregation(self, server_round: int, done: Aggregation, seconds: float) -> None:
        """Write down what the server's aggregation did."""
        self.folder.record(
            "aggregate",
            round=server_round,
            seconds=seconds,
            clients=len(done.clients),
            tasks=done.tasks,
            neighbors=done.neighbors,
            distances=done.distances,
        )

    def update_norms(self, server_round: int, verdicts: Sequence[Verdict]) -> None:
        """Write down every update's norm and bound, and log those above it."""
        self._rejected = {v.client for v in verdicts if v.action == "rejected"}
        for v in verdicts:
            self.folder.record(
                "update_norm",
                round=server_round,
                client=v.client,
                action=v.action,
                norms=v.norms,
                bounds=v.bounds,
                reason=v.reason,
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
        self.folder.record("warning", round=server_round, client=client, text=text)

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
        up = {} if received is None else {"up": num_bytes(received)}
        self.folder.record(
            "failure", round=server_round, phase=phase, client=client, reason=reason, **up
        )

    def begin(self) -> None:
        """Take note that an attempt at an exchange begins."""
        self._began = len(self.folder.events)

    def repeat(self, server_round: int, reason: str) -> None:
        """Write down, and log, that an exchange is repeated: what it recorded does not count."""
        logger.warning("%s The exchange is repeated.", reason)
        undone = len(self.folder.events) - self._began
        self.folder.record("repeat", round=server_round, reason=reason, undone=undone)

    def close(self, server_round: int, seconds: float) -> float | None:
        """End an exchange's train phase; return the mean loss of its clients that told it."""
        self.folder.record(
            "round", round=server_round, exchanges=self.num_exchanges, seconds=seconds
        )
        self.write_tables()
        trained = self.folder.select("train", server_round)
        counted = [e["loss"] for e in trained if e["client"] not in self._rejected]
        losses = [loss for loss in counted if loss is not None]
        return float(sum(losses) / len(losses)) if losses else None

    def close_evaluation(self, server_round: int, seconds: float) -> float | None:
        """End the closing evaluation; return the mean over clients of its scores."""
        self.folder.record("closing_evaluation", round=server_round, seconds=seconds)
        self.write_tables()
        scores = [e["score"] for e in self.folder.select("evaluate", server_round)]
        return float(sum(scores) / len(scores)) if scores else None

    def write_tables(self) -> None:
        """Write ``timeline.md`` and ``summary.md`` anew."""
        self.folder.write("timeline.md", timeline(self.folder.events))
        self.folder.write("summary.md", summary(self.folder.events, self.tasks))

    def reasons(self, server_round: int) -> list[str]:
        """Return why clients are missing in an exchange, first one first."""
        return [e["reason"] for e in self.folder.select("failure", server_round)]
