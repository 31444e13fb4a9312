"""The federation's clients, and each client's examples and metric.

To add a data source, add a row to `SOURCES`.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, overload

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.data.client_files import SiteFiles, Split, read_simulated, read_site
from pilot_flwr.data.demo import digits
from pilot_flwr.data.demo.questions import METRIC_OF
from pilot_flwr.data.examples import Example
from pilot_flwr.data.images import Colour, mean_colour
from pilot_flwr.errors import ConfigError, DataError
from pilot_flwr.metrics import METRICS


class PooledExamples(Sequence[Example]):
    """The examples of several clients, in order, for `strategy.trained_by=pooled`.

    An example's id is ``<client>/<id>``, because two clients may use the same one.
    """

    def __init__(self, parts: Mapping[str, Sequence[Example]]) -> None:
        self._parts = list(parts.items())
        self._ends = list(accumulate(len(examples) for _, examples in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        part = bisect_right(self._ends, position)
        client, examples = self._parts[part]
        example = examples[position - (self._ends[part] - len(examples))]
        return replace(example, id=f"{client}/{example.id}")


__all__ = [
    "SOURCES",
    "Client",
    "SiteFiles",
    "Split",
    "check_references",
    "client_examples",
    "count_examples",
    "federation_clients",
    "is_pooling",
    "padding_colour",
    "task_metric",
]

_READ: dict[tuple[str, "Client", Split, int], Sequence[Example]] = {}
_MOST_READ = 64


@dataclass(frozen=True)
class Client:
    """One client.

    Attributes
    ----------
    id, task : str
        Its name and its one task.
    index : int or None
        Position among the configured clients, task by task; None for a real site with
        another name.
    """

    id: str
    task: str
    index: int | None = None


@dataclass(frozen=True)
class Request:
    """The arguments of `client_examples`."""

    data: DataConfig
    client: Client
    split: Split
    seed: int
    files: SiteFiles | None = None
    background: Colour | None = None


@dataclass(frozen=True)
class Source:
    """A data source.

    Attributes
    ----------
    metrics : callable
        From the settings to the metric of each task that there is.
    examples : callable
        Reads a client's split.
    """

    metrics: Callable[[DataConfig], dict[str, str]]
    examples: Callable[[Request], Sequence[Example]]


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


def federation_clients(data: DataConfig) -> list[Client]:
    """Return all clients, ordered by task; ids are ``<task>-<number>``."""
    metrics = SOURCES[data.source].metrics(data)
    for task in data.tasks:
        if task in RESERVED:
            raise ConfigError(
                f"`data.tasks` names {task!r} but must not use a name that torch reserves."
            )
        if task not in metrics:
            raise ConfigError(
                f"`data.tasks` names {task!r} but source {data.source!r} has {', '.join(metrics)}."
            )
        if metrics[task] not in METRICS:
            raise ConfigError(
                f"`data.files.{task}.metric` is {metrics[task]!r} but must be one of "
                f"{', '.join(METRICS)}."
            )
    names = [(task, number) for task in data.tasks for number in range(data.clients_per_task)]
    return [Client(f"{task}-{n}", task, index) for index, (task, n) in enumerate(names)]


def is_pooling(strategy: StrategyConfig, client: Client) -> bool:
    """Whether a client trains on all clients' data: the first one in a pooled run."""
    return strategy.trained_by == "pooled" and client.index == 0


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
    assert background is not None or not _pads(data), "padding_colour() was not asked"
    return _examples(Request(data, client, split, seed, files, background))


def count_examples(
    data: DataConfig, client: Client, split: Split, *, seed: int, files: SiteFiles | None = None
) -> int:
    """Return the number of examples of one client's split, without reading any."""
    return len(_examples(Request(data, client, split, seed, files)))


def padding_colour(data: DataConfig, image_processor: Any) -> Colour | None:
    """Return the padding colour, None if images keep their aspect ratio."""
    return mean_colour(image_processor) if _pads(data) else None


def task_metric(data: DataConfig, task: str) -> str:
    """Return the name of a task's metric, a key of `pilot_flwr.metrics.METRICS`."""
    return SOURCES[data.source].metrics(data)[task]


def check_references(metric: str, example: Example) -> None:
    """Raise `DataError` unless a metric can score against an example's references."""
    try:
        METRICS[metric].check(example.answers)
    except DataError as error:
        raise DataError(f"{example.name}: {error}") from None


def _pads(data: DataConfig) -> bool:
    return data.source == "llava" and data.image_aspect_ratio == "pad"


def _examples(request: Request) -> Sequence[Example]:
    examples = SOURCES[request.data.source].examples(request)
    if not len(examples):
        raise DataError(f"The {request.split} split of client {request.client.id!r} has no rows.")
    return examples


def _digits(request: Request) -> Sequence[Example]:
    data, client, split, seed = request.data, request.client, request.split, request.seed
    if client.index is None:
        names = ", ".join(known.id for known in federation_clients(data))
        raise ConfigError(
            f"`data.source` is digits, the demo's, which has data for {names} only; "
            f"`client-id` is {client.id!r}. A site that brings its own data needs a run with "
            "`data.source=llava`."
        )
    key = (repr(data), client, split, seed)
    if key not in _READ:
        if len(_READ) >= _MOST_READ:
            _READ.pop(next(iter(_READ)))
        evaluated: digits.ClientSplit = "test" if data.evaluate_on == "test" else "validation"
        num_clients = len(data.tasks) * data.clients_per_task
        sizes = digits.client_sizes(num_clients, data.train_examples)
        _READ[key] = digits.client_examples(
            client.task,
            client_index=client.index,
            num_clients=num_clients,
            split="train" if split == "train" else evaluated,
            num_examples=sizes[client.index] if split == "train" else data.test_examples,
            seed=seed,
            rotation=data.shift.rotation,
            mirrored=data.shift.mirrored,
        )
    return _READ[key]


def _llava(request: Request) -> Sequence[Example]:
    data, client, split = request.data, request.client, request.split
    if request.files is not None:
        return read_site(
            data,
            request.files,
            client.task,
            split,
            seed=request.seed,
            background=request.background,
        )
    if client.index is None:
        raise ConfigError(
            f"Client {client.id!r} is a real site, whose data are named only in its node config."
        )
    number = client.index - data.tasks.index(client.task) * data.clients_per_task
    return read_simulated(
        data, client.task, number, split, seed=request.seed, background=request.background
    )


SOURCES: dict[str, Source] = {
    "digits": Source(
        lambda data: {task: METRIC_OF.get(task, "exact_match") for task in digits.TASKS}, _digits
    ),
    "llava": Source(lambda data: {t: files.metric for t, files in data.files.items()}, _llava),
}
"""Data source by `data.source`."""
