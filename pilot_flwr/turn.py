"""One client's turn: evaluate the incoming personalised model, then train it.

This is the client side of the algorithm without a word of Flower. The base model stays warm
in the process; what makes it this client's model is loaded from the order (what the server
sent) and from the client's own disk (what never leaves it).
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pilot_flwr.base import load_processor, make_collator
from pilot_flwr.checkpoint import PrivateState, PrivateStore
from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import (
    Client,
    SiteFiles,
    Split,
    check_references,
    client_examples,
    padding_colour,
    task_metric,
)
from pilot_flwr.data.screening import WholeImages, usable
from pilot_flwr.errors import StateError
from pilot_flwr.evaluation import EvaluationResult, evaluate
from pilot_flwr.features import FeatureCache
from pilot_flwr.models import PilotModel, warm_model
from pilot_flwr.parameters import GROUPS, GroupName, State
from pilot_flwr.personal import assemble, enter_own, enter_stage2, load_received
from pilot_flwr.plan import out_of_memory_explained
from pilot_flwr.settings import PilotConfig
from pilot_flwr.training import Encoder, TrainingResult, check_finite, train


@dataclass(frozen=True)
class Site:
    """What belongs to the client alone and never comes from the server.

    Attributes
    ----------
    client : Client
        Who it is.
    state_folder : Path
        Its own folder for this run: private state and kept features.
    device : torch.device
        Where it computes.
    files : SiteFiles, optional
        Its own data; a simulated client has what the run's configuration names.
    """

    client: Client
    state_folder: Path
    device: torch.device
    files: SiteFiles | None = None


@dataclass(frozen=True)
class Order:
    """What the server asks of a client in one exchange.

    Attributes
    ----------
    server_round : int
        Exchange, from 1.
    stage : int
        Architecture to train: the per-client stage flag, the only thing that decides it.
    tasks : tuple of str
        All T tasks in the federation's order.
    adapters : dict
        Task → ψ_t: all T in stage 2, the own one alone in stage 1.
    lora : State
        This client's Θ̄_l.
    train, evaluate : bool
        Whether to train, and whether to evaluate the incoming model before.
    """

    server_round: int
    stage: int
    tasks: tuple[str, ...]
    adapters: dict[str, State]
    lora: State
    train: bool = True
    evaluate: bool = True


@dataclass(frozen=True)
class TurnResult:
    """What a turn gives back; `adapter` and `lora` are the only parameters that are sent.

    `started` is in seconds since 1970, `seconds` is the whole turn's wall time.
    """

    adapter: State = field(default_factory=dict)
    lora: State = field(default_factory=dict)
    training: TrainingResult | None = None
    evaluation: EvaluationResult | None = None
    started: float = 0.0
    seconds: float = 0.0


def stage_trained(site: Site) -> int:
    """Return the last stage that this client trained in this run, 0 if none."""
    return private_store(site).stage()


def private_store(site: Site) -> PrivateStore:
    """Return where the client's private state of this run is."""
    return PrivateStore(site.state_folder, site.client.id, site.client.task)


def take_turn(
    site: Site, config: PilotConfig, order: Order, *, progress: Callable[[str], None]
) -> TurnResult:
    """Evaluate and train as `order` says.

    The incoming model is evaluated in the architecture that the client last trained: stage 1
    after its first training, CT-MoA after a stage-2 one. Before its first training it is
    stage 1 with an inert ψ_s: the base model with the task adapter and the LoRA that the
    server sent. In the first exchange these are the base model's own, so this is the untouched
    base model; a client that joins late is sent aggregated ones.

    Raises
    ------
    StateError
        Stage 2 is ordered but this client holds no stage-1 state, or one for other tasks.
    PilotError
        The model, the data or the training fails; the private state on disk is as before.
    """
    started = time.time()
    store = private_store(site)
    private = store.load()
    if order.train and order.stage == 2 and private is None:
        raise StateError(
            f"Client {site.client.id!r} was ordered to train stage 2 but holds no stage-1 state."
        )
    with out_of_memory_explained(config, order.stage):
        model = warm_model(
            config.model, reduction=config.train.difference_loss.reduction, device=site.device
        )
    kit = Kit(site, config, model, progress)
    if order.train:
        kit.examples("train")  # what is broken stops the turn now, not after the evaluation
    evaluation = None
    if order.evaluate:
        assemble(
            model,
            site.client.task,
            private,
            adapters=order.adapters,
            lora=order.lora,
            tasks=order.tasks,
        )
        with out_of_memory_explained(config, model.stage):
            evaluation = kit.evaluate()
    training = None
    if order.train:
        generator = turn_generator(config.seed, site.client.id, order.server_round)
        _enter_ordered_architecture(model, site.client.task, private, order, generator)
        with out_of_memory_explained(config, model.stage):
            training = kit.train(generator)
        check_finite(model)
        store.save(_private_state(model))
    return TurnResult(
        adapter=_to_send(model, "own_task_adapter") if training else {},
        lora=_to_send(model, "lora") if training else {},
        training=training,
        evaluation=evaluation,
        started=started,
        seconds=time.time() - started,
    )


def _to_send(model: PilotModel, group: GroupName) -> State:
    dtype = getattr(torch, model.config.wire_dtype)
    return {name: tensor.to(dtype) for name, tensor in model.state(group).items()}


def turn_generator(seed: int, client_id: str, server_round: int) -> torch.Generator:
    """Return the generator of one client's turn, the same however clients are scheduled."""
    text = f"{seed}/{client_id}/{server_round}".encode()
    return torch.Generator().manual_seed(zlib.crc32(text) + (zlib.adler32(text) << 32))


def _enter_ordered_architecture(
    model: PilotModel,
    task: str,
    private: PrivateState | None,
    order: Order,
    generator: torch.Generator,
) -> None:
    if private is None:
        model.enter_stage1(task)
    else:
        enter_own(model, task, private)
        if order.stage == 2:
            enter_stage2(model, private, order.tasks, generator)
    load_received(model, order.adapters, order.lora)


def _private_state(model: PilotModel) -> PrivateState:
    tasks = getattr(model.connector, "tasks", ())
    groups = {name: model.state(name) for name, row in GROUPS.items() if row.private}
    return PrivateState(model.stage, tasks, groups)


class Kit:
    """The client's data, tokenizer and feature cache, made once per turn."""

    def __init__(
        self,
        site: Site,
        config: PilotConfig,
        model: PilotModel,
        progress: Callable[[str], None],
    ) -> None:
        self.site, self.config, self.model, self.progress = site, config, model, progress
        self.processor = load_processor(config.model.path, config.model.revision)
        self.collator = make_collator(
            config.model, self.processor, model.llava.config, max_length=config.train.max_length
        )

    def train(self, generator: torch.Generator) -> TrainingResult:
        """Train on the client's training split."""
        return train(
            self.model,
            self.examples("train"),
            collator=self.collator,
            encode=self._encoder("train"),
            config=self.config.train,
            generator=generator,
            progress=self.progress,
        )

    def evaluate(self) -> EvaluationResult:
        """Evaluate on the client's test split."""
        return evaluate(
            self.model,
            self.examples("test"),
            collator=self.collator,
            encode=self._encoder("test"),
            metric=task_metric(self.config.data, self.site.client.task),
            config=self.config.evaluation,
            autocast_choice=self.config.train.autocast,
        )

    def examples(self, split: Split) -> Sequence[Example]:
        """Return the examples of a split that can be used; see `pilot_flwr.data.screening`."""
        client, data = self.site.client, self.config.data
        examples = client_examples(
            data,
            client,
            split,
            seed=self.config.seed,
            files=self.site.files,
            background=padding_colour(data, self.processor.image_processor),
        )
        metric = task_metric(data, client.task)

        def check(example: Example) -> None:
            if split == "train":
                self.collator.tokenize(example)
            else:
                self.collator.prompt(example)
                check_references(metric, example)

        return usable(
            examples,
            name=f"{split} split of client {client.id!r}",
            check=check,
            allowed=data.allowed_broken,
            settings=f"{split}/{self.config.train.max_length}/{data.check_images}"
            f"/{self.config.model}/{metric}",
            folder=self.site.state_folder / "checked",
            progress=self.progress,
            images=WholeImages(data.workers) if data.check_images == "decode" else None,
        )

    def _encoder(self, split: Split) -> Encoder:
        model, data = self.config.model, (self.config.seed, self.config.data)
        base = f"{model.path}/{model.revision}/{model.dtype}"
        cache = FeatureCache(
            model.feature_cache,
            namespace=f"{base}/{data}/{self.site.client.id}/{split}",
            folder=self.site.state_folder / "features",
            base=base,
        )
        processor, workers = self.processor.image_processor, self.config.data.workers
        return lambda parts: cache.stream(self.model, processor, parts, workers=workers)
