"""Who the clients of a simulated federation are, and which examples and metric each has.

To add a data source, add a row to `SOURCES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pilot_flwr.connector import is_reserved
from pilot_flwr.data import digits
from pilot_flwr.data.examples import Example
from pilot_flwr.data_settings import DataConfig
from pilot_flwr.errors import ConfigError

Split = Literal["train", "test"]


_READ: dict[tuple[str, "Client", Split, int], Sequence[Example]] = {}
_MOST_READ = 64


@dataclass(frozen=True)
class Client:
    """One client: `index` counts all clients of the federation, task by task."""

    id: str
    task: str
    index: int


@dataclass(frozen=True)
class Source:
    """A data source: its tasks with their metric, and how a client's examples are read."""

    metrics: dict[str, str]
    examples: Callable[[DataConfig, Client, Split, int], Sequence[Example]]


def federation_clients(data: DataConfig) -> list[Client]:
    """Return all clients, ordered by task; ids are ``<task>-<number>``.

    Raises
    ------
    ConfigError
        The source does not have one of `data.tasks`, or no module can have its name.
    """
    allowed = SOURCES[data.source].metrics
    for task in data.tasks:
        if is_reserved(task):
            raise ConfigError(
                f"`data.tasks` names {task!r} but must not use a name of torch's own."
            )
        if task not in allowed:
            raise ConfigError(
                f"`data.tasks` names {task!r} but source {data.source!r} has {', '.join(allowed)}."
            )
    names = [(task, number) for task in data.tasks for number in range(data.clients_per_task)]
    return [Client(f"{task}-{n}", task, index) for index, (task, n) in enumerate(names)]


def client_by_id(data: DataConfig, client_id: str) -> Client:
    """Return the client called `client_id`.

    Raises
    ------
    ConfigError
        There is none; names the ids that there are.
    """
    clients = {client.id: client for client in federation_clients(data)}
    if client_id not in clients:
        raise ConfigError(f"`client-id` is {client_id!r} but must be one of {', '.join(clients)}.")
    return clients[client_id]


def client_examples(
    data: DataConfig, client: Client, split: Split, *, seed: int
) -> Sequence[Example]:
    """Return the examples of one client's split, the same in every process."""
    key = (repr(data), client, split, seed)
    if key not in _READ:
        if len(_READ) >= _MOST_READ:
            _READ.pop(next(iter(_READ)))
        _READ[key] = SOURCES[data.source].examples(data, client, split, seed)
    return _READ[key]


def task_metric(data: DataConfig, task: str) -> str:
    """Return the name of a task's metric, a key of `pilot_flwr.metrics.table.METRICS`."""
    return SOURCES[data.source].metrics[task]


def _digits(data: DataConfig, client: Client, split: Split, seed: int) -> Sequence[Example]:
    num_clients = len(data.tasks) * data.clients_per_task
    sizes = digits.client_sizes(num_clients, data.train_examples)
    return digits.client_examples(
        client.task,
        client_index=client.index,
        num_clients=num_clients,
        split=split,
        num_examples=sizes[client.index] if split == "train" else data.test_examples,
        seed=seed,
    )


SOURCES: dict[str, Source] = {
    "digits": Source({task: "exact_match" for task in digits.TASKS}, _digits),
}
"""Data source by `data.source`."""
