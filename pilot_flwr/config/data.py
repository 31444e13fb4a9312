"""Settings of the federation's data: tasks, files, partition."""

from dataclasses import dataclass, field

from pilot_flwr.config.rules import at_least, at_most, check_name, one_of, positive, share
from pilot_flwr.errors import ConfigError

ALL = 0
"""`data.train_examples` and `data.test_examples` of a client that uses all that it has."""


@dataclass  # not frozen: OmegaConf cannot fill the frozen values of a dict
class TaskFiles:
    """One task's data as LLaVA JSON or JSONL, and how its answers are scored.

    Paths are relative to `data.folder`, and are those of a simulation: a real site has its own,
    from its node configuration, and `train`, `test` and `images` may then be left out. `train`
    is one file, or several that are read one after the other; with ``data.partition.kind=files``
    it is one file per client, in the clients' order. `test` is the same for the test split,
    which every client of the task has whole, unless there is a file per client or `split_test`
    deals it out as the training rows are. `images` is the folder that image names count from,
    by default `data.folder`. `prompt_suffix` is put behind every question on a line of its own.
    `metric` is a key of the table of metrics.
    """

    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    images: str = ""
    prompt_suffix: str = ""
    metric: str = "exact_match"
    split_test: bool = False


@dataclass(frozen=True)
class PartitionConfig:
    """How a task's training rows are dealt out to its clients, with Flower's partitioners.

    ``iid``: disjoint random shares of equal size. ``dirichlet``: by the values of `column`, a
    field of the rows, in shares drawn from Dirichlet(`alpha`) for each value; with an empty
    `column` the clients' sizes are drawn instead. ``files``: one file per client.
    A Dirichlet partition in which a client has fewer than `min_examples` is drawn again.
    """

    kind: str = "iid"
    alpha: float = 0.5
    column: str = ""
    min_examples: int = 10

    def __post_init__(self) -> None:
        one_of("data.partition.kind", self.kind, ("iid", "dirichlet", "files"))
        positive("data.partition.alpha", self.alpha)
        at_least("data.partition.min_examples", self.min_examples, 1)


@dataclass(frozen=True)
class ShiftConfig:
    """How the digits of all clients differ from those that the shipped base has seen.

    With ``source=digits`` alone. Each digit of a page is turned by `rotation` degrees,
    counter-clockwise, and `mirrored` left to right, whatever the client's own style.
    """

    rotation: float = 0.0
    mirrored: bool = False

    def __post_init__(self) -> None:
        at_least("data.shift.rotation", self.rotation, -180)
        at_most("data.shift.rotation", self.rotation, 180)


@dataclass(frozen=True)
class DataConfig:
    """The federation's tasks and clients: `clients_per_task` clients for every task.

    With ``source=digits``, `train_examples` is the mean number of training examples of a client
    (clients differ) and `test_examples` the number of test examples of each. With
    ``source=llava`` each of `tasks` is described in `files`, and both are the most examples that
    a client uses, drawn at random; 0 uses all. `image_aspect_ratio` is ``pad`` (to a square, in
    the image processor's mean colour, as LLaVA-1.5 does) or ``keep`` (as the image processor
    treats it). Up to a share `allowed_broken` of a client's rows may be broken or over-long: they
    are skipped and counted; with 0, one broken row stops the client before it trains.
    `check_images` says how far each image is read for that: ``decode`` reads all of it, once, which
    takes as long as reading the data once; with ``header`` an image that is broken behind its
    header stops the training when its turn comes. `workers` threads decode images while the
    model is busy with the batch before; 0 decodes in between. `evaluate_on` is ``test``, or with
    ``source=digits`` ``validation``: scans of their own, on which settings are chosen so that
    no choice sees the test split.
    """

    source: str = "digits"
    tasks: list[str] = field(default_factory=lambda: ["vqa", "counting", "captioning"])
    clients_per_task: int = 3
    train_examples: int = 200
    test_examples: int = 60
    folder: str = ""
    files: dict[str, TaskFiles] = field(default_factory=dict)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    image_aspect_ratio: str = "keep"
    check_images: str = "decode"
    allowed_broken: float = 0.0
    workers: int = 0
    evaluate_on: str = "test"
    shift: ShiftConfig = field(default_factory=ShiftConfig)

    def __post_init__(self) -> None:
        one_of("data.source", self.source, ("digits", "llava"))
        if not self.tasks:
            raise ConfigError("`data.tasks` is empty but must name at least one task.")
        for task in self.tasks:
            check_name("data.tasks", task)
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"`data.tasks` is {self.tasks} but must not name a task twice.")
        at_least("data.clients_per_task", self.clients_per_task, 1)
        least = ALL if self.source == "llava" else 1
        at_least("data.train_examples", self.train_examples, least)
        at_least("data.test_examples", self.test_examples, least)
        one_of("data.check_images", self.check_images, ("header", "decode"))
        one_of("data.image_aspect_ratio", self.image_aspect_ratio, ("keep", "pad"))
        share("data.allowed_broken", self.allowed_broken)
        at_least("data.workers", self.workers, 0)
        one_of("data.evaluate_on", self.evaluate_on, ("test", "validation"))
        if self.evaluate_on == "validation" and self.source != "digits":
            raise ConfigError(
                "`data.evaluate_on` is 'validation' but must be 'test' unless "
                "`data.source=digits`: give validation files as `data.files.<task>.test`."
            )
        if self.source == "llava":
            if self.shift != ShiftConfig():
                raise ConfigError(
                    "`data.shift` is set but must be left out unless `data.source=digits`."
                )
            self._check_files()

    def _check_files(self) -> None:
        for task in self.tasks:
            if task not in self.files:
                described = ", ".join(self.files) or "none"
                raise ConfigError(
                    f"`data.tasks` names {task!r} but `data.files` describes {described}."
                )
            for split in ("train", "test"):
                number = len(getattr(self.files[task], split))
                each = self.partition.kind == "files"
                allowed = {0, self.clients_per_task} | ({1} if split == "test" else set())
                if each and number not in allowed:
                    raise ConfigError(
                        f"`data.files.{task}.{split}` names {number} files but must name one for "
                        f"each of {self.clients_per_task} clients (`data.partition.kind=files`)."
                    )
