"""What the server writes down while a run goes on: one event per fact, at once.

Events are lines of ``metrics.jsonl``; the tables are made from them after every exchange.
"""

import logging
from collections.abc import Mapping, Sequence

from flwr.app import RecordDict

from pilot_flwr import wire
from pilot_flwr.run_folder import RunFolder
from pilot_flwr.server_state import Aggregation, Member, Update
from pilot_flwr.tables import summary, timeline

logger = logging.getLogger("flwr")


class Journal:
    """Turns what the strategy sees into events.

    Parameters
    ----------
    folder : RunFolder
        Gets events and tables.
    num_exchanges : int
        R + 1.
    """

    def __init__(self, folder: RunFolder, *, num_exchanges: int) -> None:
        self.folder, self.num_exchanges = folder, num_exchanges

    def roster(
        self, server_round: int, members: Sequence[Member], stages: Mapping[str, int]
    ) -> None:
        """Write down who takes part, and in which stage."""
        clients = [
            {"client": m.client, "task": m.task, "examples": m.examples, "stage": stages[m.client]}
            for m in members
        ]
        self.folder.record("roster", round=server_round, clients=clients)

    def update(
        self,
        server_round: int,
        stage: int,
        update: Update,
        *,
        sent: RecordDict,
        received: RecordDict,
    ) -> None:
        """Write down one client's training and the bytes that its messages had.

        Raises
        ------
        UpdateError
            Its metrics are incomplete.
        """
        numbers = wire.training_metrics(received)
        down, up = wire.num_bytes(sent), wire.num_bytes(received)
        self.folder.record(
            "train",
            round=server_round,
            stage=stage,
            client=update.client,
            task=update.task,
            loss=numbers["loss.total"],
            **{f"loss_{n}": numbers[f"loss.{n}"] for n in ("ce", "difference", "balance", "z")},
            examples=update.num_examples,
            steps=numbers["steps"],
            seconds=numbers["seconds"],
            gradients=_part(numbers, "gradients."),
            bytes_down=sum(down.values()),
            bytes_up=sum(up.values()),
            down=down,
            up=up,
            **wire.turn_times(received),
        )

    def evaluation(self, server_round: int, member: Member, content: RecordDict) -> None:
        """Write down a score, if there is one, of the model after exchange `server_round`.

        Raises
        ------
        UpdateError
            Its metrics are incomplete.
        """
        found = wire.evaluation_metrics(content)
        if found is None:
            return
        numbers, metric = found
        self.folder.record(
            "evaluate",
            round=server_round,
            client=member.client,
            task=member.task,
            score=numbers["score"],
            metric=metric,
            examples=int(numbers["examples"]),
            seconds=numbers["seconds"],
        )

    def aggregation(self, server_round: int, done: Aggregation, seconds: float) -> None:
        """Write down what the server's aggregation did."""
        self.folder.record(
            "aggregate",
            round=server_round,
            seconds=seconds,
            clients=sum(map(len, done.tasks.values())),
            tasks=done.tasks,
            neighbors=done.neighbors,
            distances=done.distances,
        )

    def failure(self, server_round: int, phase: str, client: str, reason: str) -> None:
        """Write down, and log, that a client's part in a phase is missing, and why."""
        logger.warning("Exchange %d, %s, %s: %s", server_round, phase, client, reason)
        self.folder.record("failure", round=server_round, phase=phase, client=client, reason=reason)

    def close(self, server_round: int, seconds: float) -> float:
        """End an exchange's train phase; return the mean loss of its clients."""
        self.folder.record(
            "round", round=server_round, exchanges=self.num_exchanges, seconds=seconds
        )
        self.write_tables()
        losses = [e["loss"] for e in self.folder.select("train") if e["round"] == server_round]
        return float(sum(losses) / len(losses))

    def write_tables(self) -> None:
        """Write ``timeline.md`` and ``summary.md`` anew."""
        self.folder.write("timeline.md", timeline(self.folder.events))
        self.folder.write("summary.md", summary(self.folder.events))

    def mean_score(self, server_round: int) -> float | None:
        """Return the mean over clients of the scores after an exchange."""
        scores = [e["score"] for e in self.folder.select("evaluate") if e["round"] == server_round]
        return float(sum(scores) / len(scores)) if scores else None

    def reasons(self, server_round: int) -> list[str]:
        """Return why clients are missing in an exchange, first one first."""
        return [e["reason"] for e in self.folder.select("failure") if e["round"] == server_round]


def _part(numbers: Mapping[str, float], prefix: str) -> dict[str, int]:
    return {k.removeprefix(prefix): int(v) for k, v in numbers.items() if k.startswith(prefix)}
