"""Settings of the federation's data: tasks, files, partition: ``data.*``."""

from dataclasses import dataclass, field
from typing import Annotated

from pilot_flwr.config.rules import (
    FRACTION,
    NOT_EMPTY,
    POSITIVE,
    SHARE,
    Section,
    at_least,
    check_name,
    choice,
    minimum,
)
from pilot_flwr.errors import ConfigError

ALL = 0
"""Value of `data.train_examples` and `data.test_examples` that uses every example."""


@dataclass  # not frozen: OmegaConf cannot fill the frozen values of a dict
class TaskFiles:
    """One task's files (JSON, JSONL or Hugging Face data sets) and metric.

    Paths are relative to `data.folder` and apply to simulations; a real site names its own files
    in its node config, so `train`, `test` and `images` may be left out there.
    """

    train: list[str] = field(default_factory=list)
    """Training files, read one after the other; with `data.partition.kind=files` one per client,
    in the clients' order."""
    test: list[str] = field(default_factory=list)
    """Test files; every client of the task gets all of them, unless there is one per client or
    `split_test` is set."""
    images: str = ""
    """Folder of the images; empty: `data.folder`."""
    prompt_suffix: str = ""
    """Line appended to every question."""
    metric: str = "exact_match"
    """Metric that scores the answers; see the table of metrics."""
    split_test: bool = False
    """Partition the test rows among the clients like the training rows."""


@dataclass(frozen=True)
class PartitionConfig(Section, prefix="data.partition"):
    """Partition of a task's training rows among its clients, by Flower's partitioners."""

    kind: Annotated[str, choice("iid", "dirichlet", "files")] = "iid"
    """`iid`: disjoint random shares of equal size; `dirichlet`: shares drawn from Dirichlet(α);
    `files`: one file per client."""
    alpha: Annotated[float, POSITIVE] = 0.5
    """Dirichlet concentration α; smaller is more uneven."""
    column: str = ""
    """Field whose values are divided unevenly (label skew); empty: client sizes are uneven."""
    min_examples: Annotated[int, minimum(1)] = 10
    """Minimum training examples per client; a Dirichlet partition with fewer is redrawn."""


@dataclass(frozen=True)
class DataConfig(Section, prefix="data"):
    """The federation's tasks, clients and examples."""

    source: Annotated[str, choice("digits", "llava")] = "digits"
    """`digits`: the demo's generated pages; `llava`: the files of `data.files`."""
    tasks: Annotated[list[str], NOT_EMPTY] = field(
        default_factory=lambda: ["vqa", "counting", "captioning"]
    )
    """Names of the tasks, each once."""
    clients_per_task: Annotated[int, minimum(1)] = 3
    """Clients of every task."""
    train_examples: Annotated[int, minimum(ALL)] = 200
    """`digits`: mean training examples per client, at least 1 (clients differ). `llava`: maximum
    per client, drawn at random; 0 uses all."""
    test_examples: Annotated[int, minimum(ALL)] = 60
    """`digits`: test examples per client, at least 1. `llava`: maximum per client; 0 uses all."""
    folder: str = ""
    """Folder that the paths in `data.files` are relative to."""
    files: dict[str, TaskFiles] = field(default_factory=dict)
    """Files of each task, by task name; `llava` only."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    image_aspect_ratio: Annotated[str, choice("keep", "pad")] = "keep"
    """`pad` images to squares in the image processor's mean colour, as LLaVA-1.5 does, or `keep`
    them as the image processor treats them."""
    image_reading: Annotated[str, choice("viewer", "official")] = "viewer"
    """Pixels as a `viewer` shows them, with transparency on white and the EXIF orientation applied,
    or as in LLaVA's `official` code, which ignores both."""
    linked_folders: list[str] = field(default_factory=list)
    """Folders outside a task's image folder that links in it may lead to, such as `blobs` in the
    Hugging Face hub's cache. Simulations only: a site lists its own in its node config."""
    check_images: Annotated[str, choice("header", "decode")] = "decode"
    """Image check before training: `decode` every image once, or read each `header` only; an
    image broken behind its header then stops training when it is used."""
    allowed_broken: Annotated[float, FRACTION] = 0.0
    """Share of a client's rows that may be broken or too long; they are skipped and counted. With
    0 a single one stops the client before it trains."""
    allowed_overlap: Annotated[float, SHARE] = 0.0
    """Share of a client's test rows that may also be among its training rows: the same images and
    question. At a real site, `allowed-overlap` in its node config applies instead."""
    workers: Annotated[int, minimum(0)] = 0
    """Threads that decode images ahead of the model; 0 decodes between batches."""
    evaluate_on: Annotated[str, choice("test", "validation")] = "test"
    """Split to evaluate; `validation` (`digits` only) has separate scans, for tuning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.tasks:
            check_name("data.tasks", task)
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"`data.tasks` is {self.tasks} but must not name a task twice.")
        if self.source == "digits":
            at_least("data.train_examples", self.train_examples, 1)
            at_least("data.test_examples", self.test_examples, 1)
        elif self.evaluate_on == "validation":
            raise ConfigError(
                "`data.evaluate_on` is 'validation' but must be 'test' with `data.source=llava`: "
                "give validation files as `data.files.<task>.test`."
            )
        else:
            self._check_files()

    def _check_files(self) -> None:
        for task in self.tasks:
            if task not in self.files:
                known = ", ".join(self.files) or "none"
                raise ConfigError(f"`data.tasks` names {task!r} but `data.files` has {known}.")
            if self.partition.kind != "files":
                continue
            for split in ("train", "test"):
                number = len(getattr(self.files[task], split))
                allowed = {0, self.clients_per_task} | ({1} if split == "test" else set())
                if number not in allowed:
                    raise ConfigError(
                        f"`data.files.{task}.{split}` names {number} files but must name one for "
                        f"each of {self.clients_per_task} clients (`data.partition.kind=files`)."
                    )
