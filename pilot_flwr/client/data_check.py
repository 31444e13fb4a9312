"""Check all data of a federation or of one site, as training would use it, before a run.

`open_splits` opens the files, `check_splits` reads every row; both report in the `SplitStatistics`
of each split. ``pilot-flwr data check`` prints them.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from pilot_flwr.client.node import site_client, site_config, site_files
from pilot_flwr.client.node_config import read_node_config
from pilot_flwr.client.preflight import ANY_COLOUR, check_files, client_overlap
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import Split
from pilot_flwr.data.federation import (
    check_references,
    client_examples,
    federation_clients,
    padding_colour,
    task_metric,
)
from pilot_flwr.data.llava import LlavaExamples
from pilot_flwr.data.validation import (
    SplitStatistics,
    Tokenize,
    WholeImages,
    check_split,
    shared_rows,
)
from pilot_flwr.errors import ConfigError, DataError
from pilot_flwr.model.loading import load_processor, make_collator

OpenSplit = tuple[SplitStatistics, LlavaExamples | None]
"""A split's figures, and its rows unless they cannot be read."""


class SharedRows(NamedTuple):
    """Number of rows that two splits have in common, at least one of them a training split."""

    first: str
    second: str
    rows: int


def open_splits(
    config: PilotConfig, node_config: dict[str, Any] | None = None, *, tokens: bool = True
) -> tuple[PilotConfig, list[OpenSplit]]:
    """Open every split of all simulated clients, or of the site that has a node config.

    Return them with the configuration that applies there. If a split cannot be read, its figures
    have the reason. Without `tokens`, the base model's processor is not loaded.
    """
    files, clients = None, federation_clients(config.data)
    if node_config is not None:
        node = read_node_config(node_config)
        clients = [site_client(node, config)]
        files = site_files(node, clients[0])
        check_files(files, evaluated=config.evaluation.enabled)
        config = site_config(node, config, simulated=False)
    data = config.data
    background = ANY_COLOUR if data.image_aspect_ratio == "pad" else None
    if tokens:
        processor = load_processor(config.model.path, config.model.revision)
        background = padding_colour(data, processor.image_processor)
    splits: list[OpenSplit] = []
    for client in clients:
        for split in ("train", "test") if config.evaluation.enabled else ("train",):
            figures = SplitStatistics(
                client.id,
                client.task,
                split,
                allowed=data.allowed_broken,
                decodes=data.check_images == "decode",
            )
            examples = None
            try:
                read = client_examples(
                    data, client, split, seed=config.seed, files=files, background=background
                )
                assert isinstance(read, LlavaExamples)
                examples = read
            except (ConfigError, DataError) as error:
                figures.error = str(error)
            splits.append((figures, examples))
    return config, splits


def count_overlaps(
    config: PilotConfig,
    node_config: dict[str, Any] | None,
    checked: list[SplitStatistics],
    *,
    workers: int,
) -> None:
    """Store in each test split's figures its overlap with the client's training rows."""
    files, allowed = None, config.data.allowed_overlap
    clients = {client.id: client for client in federation_clients(config.data)}
    unreadable = {figures.client for figures in checked if figures.error}
    if node_config is not None:
        node = read_node_config(node_config)
        client = site_client(node, config)
        clients, files = {client.id: client}, site_files(node, client)
        allowed = files.allowed_overlap
    for figures in checked:
        figures.allowed_overlap = allowed
        if figures.split == "test" and figures.client not in unreadable:
            client = clients[figures.client]
            figures.overlap = client_overlap(client, config, files, workers=workers, cache=None)


def find_shared_rows(splits: list[OpenSplit]) -> list[SharedRows]:
    """Return the pairs of splits with common rows, except pairs of test splits."""
    named = [
        (f"{figures.client} {figures.split}", rows) for figures, rows in splits if rows is not None
    ]
    shared = (SharedRows(*found) for found in shared_rows(named))
    return [s for s in shared if not (s.first.endswith(" test") and s.second.endswith(" test"))]


def check_splits(
    config: PilotConfig,
    splits: list[OpenSplit],
    *,
    decode: bool,
    tokens: bool,
    workers: int,
    progress: Callable[[str, int], None],
) -> list[SplitStatistics]:
    """Read every row and return the figures of all splits.

    Rows that several clients share, as those of a test file, are read once. `decode` reads whole
    images with `workers` threads, `tokens` counts tokens; `progress` gets the name of each finished
    split and its number of rows.
    """
    images = WholeImages(workers) if decode else None
    tokenize: dict[Split, Tokenize] = {}
    if tokens:
        model = config.model
        collator = make_collator(
            model,
            load_processor(model.path, model.revision),
            max_length=config.train.max_length,
            cut=config.train.over_long == "cut",
        )
        tokenize = {"train": collator.tokenize, "test": lambda e: (collator.prompt(e), [])}
    seen: dict[object, SplitStatistics] = {}
    checked = []
    for figures, examples in splits:
        if examples is not None:
            files = tuple(str(file.path) for file in examples.files)
            metric = task_metric(config.data, figures.task)
            key = (figures.split, metric, files, examples.reading, examples.rows.tobytes())
            if key not in seen:
                test = figures.split == "test"
                seen[key] = check_split(
                    examples,
                    figures,
                    tokenize=tokenize.get(figures.split),
                    images=images,
                    workers=workers,
                    references=functools.partial(check_references, metric) if test else None,
                )
            figures = replace(seen[key], client=figures.client)
            progress(f"{figures.client} {figures.split}", len(examples))
        checked.append(figures)
    return checked
