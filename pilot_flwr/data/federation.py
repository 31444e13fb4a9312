"""The federation's clients, and each client's examples and metric.

To add a data source, add a row to `SOURCES`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.rules import one_of
from pilot_flwr.config.schema import PilotConfig, StrategyConfig
from pilot_flwr.data import demo
from pilot_flwr.data.client_files import SiteFiles, Split, read_simulated, read_site
from pilot_flwr.data.examples import Example
from pilot_flwr.data.images import Colour, mean_colour
from pilot_flwr.errors import ConfigError, DataError
from pilot_flwr.metrics import METRICS

RESERVED = frozenset(
    """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu
    cuda double dump_patches eval extra_repr float forward get_buffer get_extra_state
    get_parameter get_submodule half ipu items keys load_state_dict modules mtia named_buffers
    named_children named_modules named_parameters parameters pop register_backward_hook
    register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
    set_submodule share_memory smart_apply state_dict to to_empty train training type update values
    xpu zero_grad
    """.split()
)
"""Attributes of torch modules, which cannot name a task adapter (tested against torch)."""


@dataclass(frozen=True)
class Client:
    """A client and its task.

    `index` counts the configured clients, task by task; None for a real site with another name.
    """

    id: str
    task: str
    index: int | None = None


def federation_clients(data: DataConfig) -> list[Client]:
    """Return all clients, ordered by task; ids are ``<task>-<number>``."""
    metrics = SOURCES[data.source].metrics(data)
    for task in data.tasks:
        if task in RESERVED:
            raise ConfigError(f"`data.tasks` names {task!r} but must not: torch reserves it.")
        if task not in metrics:
            raise ConfigError(
                f"`data.tasks` names {task!r} but source {data.source!r} has {', '.join(metrics)}."
            )
        one_of(f"data.files.{task}.metric", metrics[task], tuple(METRICS))
    names = [(task, number) for task in data.tasks for number in range(data.clients_per_task)]
    return [Client(f"{task}-{n}", task, index) for index, (task, n) in enumerate(names)]


def trains_pooled(strategy: StrategyConfig, client: Client) -> bool:
    """Return whether a client trains on all clients' data: the first one of a pooled run."""
    return strategy.trained_by == "pooled" and client.index == 0


class PooledExamples(Sequence[Example]):
    """The examples of several clients, in order, for `strategy.trained_by=pooled`.

    An example's id is ``<client>/<id>``, because two clients may use the same one.
    """

    def __init__(self, parts: Mapping[str, Sequence[Example]]) -> None:
        self._places = [(name, rows, n) for name, rows in parts.items() for n in range(len(rows))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """Return one example, or those of a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        client, examples, number = self._places[index]
        example = examples[number]
        return replace(example, id=f"{client}/{example.id}")


def client_examples(
    data: DataConfig,
    client: Client,
    split: Split,
    *,
    seed: int,
    files: SiteFiles | None = None,
    background: Colour | None = None,
) -> Sequence[Example]:
    """Return the examples of one client's split, the same in every process."""
    assert background is not None or not _pads(data), "`background` must be padding_colour()"
    return _read(data, client, split, seed, files, background)


def count_examples(
    data: DataConfig, client: Client, split: Split, *, seed: int, files: SiteFiles | None = None
) -> int:
    """Return the number of examples of one client's split, without reading any."""
    if data.source == "digits":  # generated when they are first read
        return _num_digits(data, client, split)
    return len(_read(data, client, split, seed, files, None))


def declared_examples(
    config: PilotConfig, client: Client, *, files: SiteFiles | None = None
) -> int:
    """Return the training examples that a client declares: its rows, broken ones included."""
    data = config.data
    clients = federation_clients(data) if trains_pooled(config.strategy, client) else [client]
    return sum(count_examples(data, c, "train", seed=config.seed, files=files) for c in clients)


def _read(
    data: DataConfig,
    client: Client,
    split: Split,
    seed: int,
    files: SiteFiles | None,
    background: Colour | None,
) -> Sequence[Example]:
    examples = SOURCES[data.source].examples(data, client, split, seed, files, background)
    if not len(examples):
        raise DataError(f"The {split} split of client {client.id!r} has no rows.")
    return examples


def padding_colour(data: DataConfig, image_processor: Any) -> Colour | None:
    """Return the padding colour, None if images keep their aspect ratio."""
    return mean_colour(image_processor) if _pads(data) else None


def _pads(data: DataConfig) -> bool:
    return data.source == "llava" and data.image_aspect_ratio == "pad"


def task_metric(data: DataConfig, task: str) -> str:
    """Return the name of a task's metric, a key of `pilot_flwr.metrics.METRICS`."""
    return SOURCES[data.source].metrics(data)[task]


def check_references(metric: str, example: Example) -> None:
    """Raise `DataError` unless a metric can score against an example's references."""
    try:
        METRICS[metric].check(example.answers)
    except DataError as error:
        raise DataError(f"{example.name}: {error}") from None


_demo_examples = functools.lru_cache(maxsize=64)(demo.client_examples)


def _num_digits(data: DataConfig, client: Client, split: Split) -> int:
    """Return the size of a split of the demo's data."""
    if client.index is None:
        names = ", ".join(known.id for known in federation_clients(data))
        raise ConfigError(
            f"`data.source` is digits, the demo's, with data for {names} only, but `client-id` is "
            f"{client.id!r}. Real sites need a run with `data.source=llava`."
        )
    if split == "test":
        return data.test_examples
    num_clients = len(data.tasks) * data.clients_per_task
    return demo.client_sizes(num_clients, data.train_examples)[client.index]


def _digits(
    data: DataConfig, client: Client, split: Split, seed: int, *_: object
) -> Sequence[Example]:
    num_examples = _num_digits(data, client, split)
    assert client.index is not None
    return _demo_examples(
        client.task,
        client_index=client.index,
        num_clients=len(data.tasks) * data.clients_per_task,
        split="train" if split == "train" else data.evaluate_on,
        num_examples=num_examples,
        seed=seed,
    )


def _llava(
    data: DataConfig,
    client: Client,
    split: Split,
    seed: int,
    files: SiteFiles | None,
    background: Colour | None,
) -> Sequence[Example]:
    if files is not None:
        return read_site(data, files, client.task, split, seed, background)
    if client.index is None:
        raise ConfigError(f"Client {client.id!r} is a site: its node config must name its data.")
    number = client.index % data.clients_per_task
    return read_simulated(data, number, client.task, split, seed, background)


class Source(NamedTuple):
    """A data source.

    `metrics` returns the metric of each task; `examples` reads a client's split, from the
    arguments of `client_examples`.
    """

    metrics: Callable[[DataConfig], dict[str, str]]
    examples: Callable[
        [DataConfig, Client, Split, int, SiteFiles | None, Colour | None], Sequence[Example]
    ]


SOURCES: dict[str, Source] = {
    "digits": Source(
        lambda data: dict.fromkeys(demo.TASKS, "exact_match"),
        _digits,
    ),
    "llava": Source(
        lambda data: {task: files.metric for task, files in data.files.items()}, _llava
    ),
}
"""Data source by `data.source`."""
