"""Compute scores, bytes and exchanges from events, for tables, reports and live output.

`read_run` opens a run folder; a run in progress or one that failed gives what there is so far.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.config.loading import from_yaml
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.run.atomic import read_json
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import (
    Aggregated,
    ClientFailed,
    Evaluated,
    EvaluationClosed,
    Event,
    ExchangeClosed,
    InstructionSent,
    RosterCalled,
    Trained,
    select,
)
from pilot_flwr.run.provenance import read_provenance

MEAN = "mean over tasks"
"""Key of the mean beside the tasks' scores; no task can have this name."""


def tasks_of(events: Sequence[Event]) -> list[str]:
    """Return the tasks of all clients that were available or have a score, sorted."""
    rosters = select(events, RosterCalled)
    rostered = {entry.task for event in rosters for entry in event.clients}
    available = {task for event in rosters for task in event.available or ()}
    return sorted(rostered | available | {event.task for event in select(events, Evaluated)})


def clients_by_task(events: Sequence[Event]) -> dict[str, set[str]]:
    """Return the clients of every task that were ever on a roster or have a score."""
    found: dict[str, set[str]] = {}
    for event in events:
        if isinstance(event, RosterCalled):
            for entry in event.clients:
                found.setdefault(entry.task, set()).add(entry.client)
        elif isinstance(event, Evaluated):
            found.setdefault(event.task, set()).add(event.client)
    return found


def scores_by_task(events: Iterable[Event]) -> dict[str, dict[int, list[Evaluated]]]:
    """Return task → exchange → the evaluations of its clients."""
    found: dict[str, dict[int, list[Evaluated]]] = {}
    for event in select(events, Evaluated):
        found.setdefault(event.task, {}).setdefault(event.exchange, []).append(event)
    return found


def task_scores(events: Iterable[Event], exchange: int) -> dict[str, float]:
    """Compute every task's score of the models after an exchange; 0 is before any training.

    ::

        score_t = Σ_k n_k score_k / Σ_k n_k        over the clients k of task t

    A task without test examples is omitted. The order of the events does not matter.
    """
    by_task: dict[str, list[Evaluated]] = {}
    for event in select(events, Evaluated, exchange):
        by_task.setdefault(event.task, []).append(event)
    scores = {}
    for task, evaluated in by_task.items():
        if examples := sum(event.examples for event in evaluated):
            total = math.fsum(event.score * event.examples for event in evaluated)
            scores[task] = total / examples
    return scores


def mean_over_tasks(scores: Mapping[str, float], tasks: Collection[str]) -> float | None:
    """Compute the unweighted mean over `tasks`; None if one has no score.

    A mean over the tasks that happen to have a score would rise when the hardest one fails.
    """
    if not tasks or not scores.keys() >= set(tasks):
        return None
    return math.fsum(scores[task] for task in tasks) / len(tasks)


def score_curves(events: Sequence[Event]) -> dict[str, dict[int, float]]:
    """Return the learning curves of a run: task, or `MEAN`, → exchange → score."""
    tasks = tasks_of(events)
    curves: dict[str, dict[int, float]] = {}
    by_exchange: dict[int, list[Evaluated]] = {}
    for event in select(events, Evaluated):
        by_exchange.setdefault(event.exchange, []).append(event)
    for number in sorted(by_exchange):
        scores = task_scores(by_exchange[number], number)
        if (mean := mean_over_tasks(scores, tasks)) is not None:
            scores[MEAN] = mean
        for name, score in scores.items():
            curves.setdefault(name, {})[number] = score
    return curves


def bytes_down(events: Iterable[Event], exchange: int | None = None) -> dict[str, int]:
    """Return part of the model → bytes that the server sent, in all exchanges or in one."""
    return _sums(event.down for event in select(events, InstructionSent, exchange))


def bytes_up(events: Sequence[Event], exchange: int | None = None) -> dict[str, int]:
    """Return part of the model → bytes that clients sent, including rejected replies."""
    failed = (event.up or {} for event in select(events, ClientFailed, exchange))
    return _sums([*(event.up for event in select(events, Trained, exchange)), *failed])


def _sums(messages: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return part → bytes over all messages; parts without any bytes are omitted."""
    sums = Counter[str]()
    for sizes in messages:
        sums.update(sizes)
    return {part: size for part, size in sums.items() if size}


@dataclass(frozen=True)
class Exchange:
    """What was observed of one exchange, or of the closing evaluation, so far.

    `seconds` is None until it is closed. `down` and `up` are bytes by part of the model, summed
    over the clients.
    """

    number: int
    seconds: float | None
    trained: list[Trained]
    down: dict[str, int]
    up: dict[str, int]
    aggregated: Aggregated | None
    failures: int

    @property
    def stages(self) -> dict[int, list[Trained]]:
        """The clients' training by stage."""
        numbers = sorted({event.stage for event in self.trained})
        return {n: [event for event in self.trained if event.stage == n] for n in numbers}


def observe(events: Sequence[Event], number: int) -> Exchange:
    """Return what was observed of an exchange.

    The instructions of the closing evaluation belong to the exchange after the last one.
    """
    closed = [event.seconds for event in select(events, ExchangeClosed, number)]
    closed += [event.seconds for event in select(events, EvaluationClosed, number - 1)]
    return Exchange(
        number=number,
        seconds=closed[-1] if closed else None,
        trained=select(events, Trained, number),
        down=bytes_down(events, number),
        up=bytes_up(events, number),
        aggregated=next(reversed(select(events, Aggregated, number)), None),
        failures=len(select(events, ClientFailed, number)),
    )


def observe_all(events: Sequence[Event]) -> dict[int, Exchange]:
    """Return what was observed of every exchange that has events, in one pass over them."""
    by_exchange: dict[int, list[Event]] = {}
    for event in events:
        number = event.exchange + isinstance(event, EvaluationClosed)
        by_exchange.setdefault(number, []).append(event)
    return {number: observe(found, number) for number, found in sorted(by_exchange.items())}


def gradients(trained: Sequence[Trained]) -> dict[str, tuple[int, int]]:
    """Return group → fewest and most of its parameters that had a gradient on a client."""
    counts = {g: [event.gradients.get(g, 0) for event in trained] for g in GROUPS}
    return {group: (min(n), max(n)) for group, n in counts.items() if any(n)}


@dataclass(frozen=True)
class RunData:
    """A run folder, read; `result` and `code` are empty if their files are missing."""

    folder: Path
    config: PilotConfig
    config_text: str
    overrides: str
    events: list[Event]
    result: dict[str, Any]
    code: dict[str, Any]

    @cached_property
    def exchanges(self) -> list[Exchange]:
        """All exchanges that have begun."""
        kinds = (InstructionSent, Trained, ExchangeClosed)
        seen = {event.exchange for event in self.events if isinstance(event, kinds)}
        last = self.config.strategy.rounds + 1
        return [e for n, e in observe_all(self.events).items() if n in seen and n <= last]

    @cached_property
    def closing(self) -> Exchange | None:
        """The closing evaluation after the last exchange, if it has begun."""
        number = self.config.strategy.rounds + 2
        begun = select(self.events, InstructionSent, number)
        return observe(self.events, number) if begun else None

    @property
    def all_exchanges(self) -> list[Exchange]:
        """The exchanges and the closing evaluation: everything that sends bytes."""
        return [*self.exchanges, *([self.closing] if self.closing else [])]

    @cached_property
    def task_of(self) -> dict[str, str]:
        """Client → task, in the federation's order."""
        rosters = select(self.events, RosterCalled)
        seen = {entry.client: entry.task for event in rosters for entry in event.clients}
        tasks = list(self.config.data.tasks)
        order = sorted(seen, key=lambda name: (tasks.index(seen[name]), _natural(name)))
        return {client: seen[client] for client in order}

    @property
    def tasks(self) -> list[str]:
        """The tasks that have clients, in the federation's order."""
        return list(dict.fromkeys(self.task_of.values()))

    def clients(self, task: str) -> list[str]:
        """Return a task's clients."""
        return [client for client, other in self.task_of.items() if other == task]

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """The `score_curves`."""
        return score_curves(self.events)

    @cached_property
    def _scores(self) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for event in select(self.events, Evaluated):
            found.setdefault(event.client, {})[event.exchange] = event.score
        return found

    def scores(self, client: str) -> dict[int, float]:
        """Return a client's score after each exchange; 0 is before any training."""
        return self._scores.get(client, {})

    def metric(self, task: str) -> str:
        """Return the name of a task's metric, empty if it has no score."""
        return next((e.metric for e in select(self.events, Evaluated) if e.task == task), "")


def read_run(folder: Path) -> RunData:
    """Read a run folder; `RunError`, `ConfigError` or `StateError` if a file is not a run's."""
    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise RunError(f"{folder} is not a run folder: it has no readable config.yaml.") from None
    try:
        config = from_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a run's configuration: {error}") from None
    try:
        overrides = (folder / "overrides.txt").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        overrides = ""
    return RunData(
        folder=folder,
        config=config,
        config_text=text,
        overrides=overrides,
        events=read_events(folder),
        result=read_json(folder / "result.json"),
        code=read_provenance(folder),
    )


def _natural(name: str) -> tuple[str, int]:
    """Sort ``vqa-10`` after ``vqa-9``."""
    front, _, number = name.rpartition("-")
    return (front, int(number)) if number.isdecimal() else (name, -1)
