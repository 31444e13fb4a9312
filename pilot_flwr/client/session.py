"""One client's session: evaluate the incoming personalised model, then train it.

The client side of the algorithm, without Flower (docs/explanation/method.md, section 3). The base
model stays in the process; each session loads the received adapters and the private state.

With `train.personal`, a session also trains a personal model v on the client's loss F_k, with the
shared model w as the server sent it (`pilot_flwr.client.personalization`). In Ditto (Li et al.,
ICML 2021, arXiv 2012.04221, algorithm 1, lines 5 to 8), v is pulled to w::

    min over v of   F_k(v) + λ / 2 · ‖v − w_sent‖²

In FedDPA-T (Yang et al., NeurIPS 2024, arXiv 2403.19211), v is a LoRA beside that of w_sent, which
is frozen. v starts as the first w sent, never leaves the client, and is evaluated instead of w.
Each of the two gets half of the epochs, so that a session takes as many steps as with another
method. In FedDAT (`pilot_flwr.client.mutual`), both are trained in every step of these epochs.

With several processes (`pilot_flwr.client.parallel`), the session runs in the first of them; the
others take part in training and evaluation alone (`pilot_flwr.client.rank`).
"""

import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from pilot_flwr.algorithm.lora_ranks import rank_of
from pilot_flwr.algorithm.parameter_groups import PERSONAL_GROUPS, Sharing
from pilot_flwr.algorithm.quantization import compress
from pilot_flwr.client.client_data import SESSION_LOCK, open_client_data
from pilot_flwr.client.evaluation import evaluate
from pilot_flwr.client.mutual import Teacher
from pilot_flwr.client.node import Site, find_device
from pilot_flwr.client.optimizer import RunSchedule
from pilot_flwr.client.parallel import Ranks, in_parallel
from pilot_flwr.client.personalization import (
    Received,
    extract_private_state,
    load_personal,
    personalize,
    personalize_as_trained,
)
from pilot_flwr.client.privacy import release
from pilot_flwr.client.private_state import PrivateState
from pilot_flwr.client.rank import Part, adapters, take_part, train_client
from pilot_flwr.client.training import Proximal, check_finite, sent_parameters
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.config.train import PersonalConfig, TrainConfig
from pilot_flwr.data.client_files import Split
from pilot_flwr.data.federation import declared_examples
from pilot_flwr.errors import ConfigError, StateError
from pilot_flwr.formatting import count
from pilot_flwr.model.resource_plan import out_of_memory_explained
from pilot_flwr.protocol import (
    EvaluationResult,
    GroupName,
    Instruction,
    SessionResult,
    Spent,
    State,
    TrainingResult,
)
from pilot_flwr.run.atomic import hold

PATIENCE_SECONDS = 60.0
"""How long a session waits for an earlier one that the server has given up."""

SHARED: tuple[GroupName, ...] = ("own_task_adapter", "lora")
"""Θ_a and Θ_l: the groups of the upload."""


def run_session(
    site: Site, config: PilotConfig, instruction: Instruction, *, progress: Callable[[str], None]
) -> SessionResult:
    """Evaluate and train as the server instructs.

    The session starts from the newest private state of an earlier exchange, so a repeated exchange
    gives the same result. It evaluates the architecture that the client last trained; before its
    first training, stage 1 with an inert ψ_s: the base model with the task adapter and LoRA that
    the server sent, which in the first exchange are the base model's own.

    Raises `StateError` if the private state does not fit the instruction, `RunError` if another
    session of this client is still running here, another `PilotError` if the model, the data or
    the training fails. The private state on disk then stays unchanged.
    """
    lock = site.state_folder / SESSION_LOCK
    with hold(lock, f"The state folder of client {site.client.id!r}", patience=PATIENCE_SECONDS):
        started = time.time()
        private = site.private_store.load(before=instruction.server_round)
        if instruction.train:
            site.check_budget(config.privacy)
            site.private_store.check_exchange(instruction.server_round)
            if instruction.stage == 2 and private is None:
                raise StateError(
                    f"Client {site.client.id!r} was asked to train stage 2 but holds no stage-1 "
                    "state."
                )
        session = Session(site, config, instruction, private, progress)
        evaluation, result = None, SessionResult()
        if instruction.evaluate and not config.privacy.withholds_metrics:
            evaluation = session.evaluate_incoming()
        if instruction.train:
            result, trained = session.train_and_upload()
            site.private_store.save(trained, server_round=instruction.server_round)
        if config.privacy.withholds_metrics:
            return result
        return replace(
            result, evaluation=evaluation, started=started, seconds=time.time() - started
        )


def session_generator(seed: int, client_id: str, server_round: int) -> torch.Generator:
    """Return the generator of one client's session, the same however clients are scheduled."""
    text = f"{seed}/{client_id}/{server_round}".encode()
    return torch.Generator().manual_seed(zlib.crc32(text) + (zlib.adler32(text) << 32))


def check_precision(device: torch.device, config: PilotConfig) -> None:
    """Raise `ConfigError` for training in float16 on a CPU."""
    if config.model.dtype == "float16" and device.type == "cpu":
        raise ConfigError(
            "`model.dtype` is float16 but must be bfloat16 or float32 for training on a CPU."
        )


def _check_rank(site: Site, config: PilotConfig, instruction: Instruction) -> None:
    """Raise `StateError` if the server sent a LoRA of another rank than the client's."""
    rank, received = site.lora_rank or config.model.lora.rank, rank_of(instruction.lora)
    if received not in (0, rank):
        raise StateError(
            f"The server sent a LoRA of rank {received} but client {site.client.id!r} trains rank "
            f"{rank}. If the client's rank has just changed, the next exchange uses it."
        )


class Session:
    """One session's model, data and instruction; `private` is the state it starts from."""

    def __init__(
        self,
        site: Site,
        config: PilotConfig,
        instruction: Instruction,
        private: PrivateState | None,
        progress: Callable[[str], None],
    ) -> None:
        self.site, self.config, self.instruction = site, config, instruction
        self.private = private
        self.sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
        self.received = Received(
            site.client.task,
            instruction.tasks,
            instruction.adapters,
            instruction.lora,
            instruction.residual,
            self.sharing,
            config.seed,
            config.train.personal,
        )
        device = find_device(site.device)
        if instruction.train:
            check_precision(device, config)
        _check_rank(site, config, instruction)
        with out_of_memory_explained(config, instruction.stage):
            self.data = open_client_data(site, config, device, progress)
        self.model = self.data.model
        self.spent: Spent | None = None
        if instruction.train:
            if config.privacy.enabled:
                self.spent = self._charge()  # before any data is read: a failure is not free
            self.data.examples("train")  # broken data ends the session before the evaluation

    def evaluate_incoming(self) -> EvaluationResult:
        """Evaluate the incoming personalised model on the client's test split."""
        personalize_as_trained(self.model, self.private, self.received)
        with out_of_memory_explained(self.config, self.model.stage), self._ranks("test") as ranks:
            return evaluate(
                self.model,
                self.data.examples("test"),
                collator=self.data.collator,
                encode=self.data.encoder("test"),
                metric=self.data.metric,
                config=self.config.evaluation,
                autocast_choice=self.config.train.autocast,
                instances=self.data.instances(),
                ranks=ranks,
            )

    def train_and_upload(self) -> tuple[SessionResult, PrivateState]:
        """Train in the instruction's stage; return the upload and the new private state."""
        generator = session_generator(
            self.config.seed, self.site.client.id, self.instruction.server_round
        )
        self._personalize(generator)
        weight = self.config.train.proximal_weight
        sent = sent_parameters(self.model, self.sharing) if weight > 0 else []
        schedule = self._run_schedule()
        cut = self.data.collator.cut_examples
        cut.clear()  # the check of the rows notes them under other ids
        with out_of_memory_explained(self.config, self.model.stage):
            pull = Proximal(sent, weight) if sent else None
            teacher = self._teacher()
            training = self._fit(generator, pull, schedule, teacher)
        check_finite(self.model)
        trained = extract_private_state(self.model, self.sharing)
        result, errors = self._upload()
        trained = replace(trained, errors=errors)
        if schedule is not None:
            trained = replace(trained, moments=schedule.moments)
        if teacher is not None:
            with teacher.active():
                check_finite(self.model)
            trained = replace(trained, personal={"lora": teacher.lora()})
            training = replace(training, steps=2 * training.steps)
        elif self.config.train.personal.model != "none":
            personal, second = self._train_personal(generator)
            trained = replace(trained, personal=personal)
            steps, seconds = training.steps + second.steps, training.seconds + second.seconds
            training = replace(training, steps=steps, seconds=seconds)
        if cut:
            self.data.progress(
                f"cut {count(len(cut), 'training example')} at `train.max_length`, "
                f"{self.config.train.max_length} tokens"
            )
        if self.config.privacy.enabled:
            training = self._public(training)
        return replace(result, training=training), trained

    def _teacher(self) -> Teacher | None:
        """Return the personal model to train together with the shared one, which is loaded."""
        personal = self.config.train.personal
        if not personal.mutual:
            return None
        self.model.set_residual(self.received.lora)
        own = self.private.personal["lora"] if self.private else self.received.lora
        return Teacher(self.model, personal, own)

    def _train_personal(
        self, generator: torch.Generator
    ) -> tuple[dict[GroupName, State], TrainingResult]:
        """Train the personal model from what the server sent; return it by group."""
        self._personalize(generator)
        personal = self.config.train.personal
        groups = PERSONAL_GROUPS[personal.model]
        sent = sent_parameters(self.model, self.sharing, groups) if personal.pull > 0 else []
        pull = Proximal(sent, personal.pull) if sent else None
        load_personal(self.model, self.private, self.received)
        result = self._fit(generator, pull)
        check_finite(self.model)
        return {group: self.model.state(group) for group in groups}, result

    def _personalize(self, generator: torch.Generator) -> None:
        stage = self.instruction.stage
        personalize(self.model, self.private, self.received, stage=stage, generator=generator)

    def _run_schedule(self) -> RunSchedule | None:
        if self.config.train.schedule == "exchange":
            return None
        if self.private is not None and not self.private.moments:
            raise StateError(
                "The private state holds no optimizer state: it is from a run without "
                "`train.schedule=run`."
            )
        exchange, exchanges = self.instruction.server_round - 1, self.config.strategy.rounds + 1
        return RunSchedule(exchange, exchanges, self.private.moments if self.private else {})

    def _fit(
        self,
        generator: torch.Generator,
        proximal: Proximal | None,
        schedule: RunSchedule | None = None,
        teacher: Teacher | None = None,
    ) -> TrainingResult:
        """Train the loaded model on the client's training split."""
        config = self.config.train
        if config.personal.model != "none":  # two models, half of the epochs each
            config = replace(config, epochs=config.epochs // 2, personal=PersonalConfig())
        with self._ranks("train", config, generator, schedule, teacher) as ranks:
            return train_client(
                ranks,
                self.data,
                config,
                generator,
                proximal=proximal,
                run_schedule=schedule,
                teacher=teacher,
            )

    @contextlib.contextmanager
    def _ranks(
        self,
        split: Split,
        train: TrainConfig | None = None,
        generator: torch.Generator | None = None,
        schedule: RunSchedule | None = None,
        teacher: Teacher | None = None,
    ) -> Iterator[Ranks]:
        """Run one training or evaluation in the client's other processes, too, in the block."""
        groups = self.model.groups()
        task = Part(
            site=self.site,
            config=self.config,
            tasks=getattr(self.model.connector, "tasks", (self.model.own_task,)),
            stage=self.model.stage,
            lora_rank=rank_of(groups["lora"]),
            residual={n: tuple(p.shape) for n, p in groups["residual"].items()},
            share=self.model.share,
            split=split,
            examples=len(self.data.examples(split)),
            train=train,
            generator=bytes(generator.get_state().tolist()) if generator else b"",
            schedule=replace(schedule, moments={}) if schedule else None,
            together=teacher is not None,
        )
        number, device = self.site.processes, self.model.device
        with in_parallel(number, device, take_part, task) as ranks:
            ranks.spread(adapters(self.model))
            if schedule is not None:
                ranks.spread_state(schedule.moments)
            if teacher is not None:
                ranks.spread(list(teacher.tensors.values()))
            yield ranks

    def _charge(self) -> Spent:
        """Count this session's release; return what the run has spent."""
        privacy = self.config.privacy
        spent, in_total = self.site.account.spend(
            privacy,
            run=self.site.run,
            server_round=self.instruction.server_round,
            check=lambda: self.site.check_budget(privacy),
        )
        self.data.progress(
            f"one release counted: at δ = {spent.delta:g}, ε = {spent.epsilon:.4g} in this run "
            f"({count(spent.releases, 'release')}) and {in_total.epsilon:.4g} over all runs "
            f"({count(in_total.releases, 'release')})"
        )
        return spent

    def _public(self, training: TrainingResult) -> TrainingResult:
        """Return what a private run reports: the declared examples, the rest only if allowed.

        The number of usable examples depends on the rows' content and on settings of the server,
        as do the steps, the groups with gradients and the times.
        """
        examples = declared_examples(self.config, self.site.client, files=self.site.files)
        if self.config.privacy.send_metrics:
            return replace(training, examples=examples)
        return TrainingResult(losses={}, steps=0, examples=examples, seconds=0.0, gradients={})

    def _upload(self) -> tuple[SessionResult, dict[GroupName, State]]:
        """Return the upload, clipped and noised in a private run, and its compression errors.

        In a private run the noisy release is compressed, so its errors disclose no more than it.
        """
        privacy, bits = self.config.privacy, self.model.config.upload_bits
        dtype = getattr(torch, self.model.config.wire_dtype)
        rounded = None if bits or privacy.enabled else dtype  # both need full precision
        upload: dict[GroupName, State] = {
            group: self.model.state(
                group, wanted=functools.partial(self.sharing.sends, group), dtype=rounded
            )
            for group in SHARED
        }
        sent: dict[GroupName, State] = {
            "own_task_adapter": self.instruction.adapters.get(self.site.client.task, {}),
            "lora": self.instruction.lora,
        }
        if privacy.enabled:
            upload, clipping = release(
                upload,
                sent,
                clip_norm=privacy.clip_norm,
                noise_multiplier=privacy.noise_multiplier,
            )
            self.data.progress(
                f"upload of norm {clipping.norm:.4g} scaled by {clipping.factor:.3g}, noise added"
            )
        errors: dict[GroupName, State] = {}
        if bits:
            before = self.private.errors if self.private else {}
            for group in SHARED:
                upload[group], errors[group] = compress(
                    upload[group], sent[group], before.get(group, {}), bits
                )
        else:
            upload = {g: {n: t.to(dtype) for n, t in state.items()} for g, state in upload.items()}
        adapter, lora = (upload[group] for group in SHARED)
        return SessionResult(adapter, lora, spent=self.spent), errors
