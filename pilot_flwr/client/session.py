"""One client's session: evaluate the incoming personalised model, then train it.

The client side of the algorithm, without Flower (docs/explanation/method.md, section 3). The base
model stays warm in the process; a session loads into it what the server sent and what never leaves
the client's disk.

Ditto: a personal model beside the shared one (Li et al., ICML 2021, arXiv 2012.04221). A session
trains the shared model w as without Ditto, then a personal one, v, on the client's loss F_k and a
pull to the shared model as the server sent it (algorithm 1, lines 5 to 8)::

    min over v of   F_k(v) + λ / 2 · ‖v − w_sent‖²

v starts as the first w that is sent, never leaves the client, and is the model that the client is
evaluated by. Each of the two gets half of the session's epochs, so that a session takes as many
steps as with another method.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.client.client_data import ClientData
from pilot_flwr.client.evaluation import evaluate
from pilot_flwr.client.node import Site, find_device
from pilot_flwr.client.personalization import (
    Received,
    extract_private_state,
    personalize,
    personalize_as_trained,
)
from pilot_flwr.client.privacy import release
from pilot_flwr.client.private_state import PrivateState
from pilot_flwr.client.training import Proximal, check_finite, sent_parameters, train
from pilot_flwr.config.schema import DittoConfig, PilotConfig
from pilot_flwr.errors import StateError
from pilot_flwr.formatting import count
from pilot_flwr.model.loading import loaded_model
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.resource_plan import out_of_memory_explained
from pilot_flwr.protocol import (
    EvaluationResult,
    GroupName,
    Instruction,
    SessionResult,
    State,
    TrainingResult,
)
from pilot_flwr.run.atomic import hold

SESSION_LOCK = ".turn.lock"
"""File in a client's state folder: one session at a time, as each ends by replacing the state."""

PATIENCE_SECONDS = 60.0
"""How long a session waits for an earlier one, which the server may have given up on."""

SHARED: tuple[GroupName, ...] = ("own_task_adapter", "lora")
"""Θ_a and Θ_l: what is uploaded, and what Ditto's v consists of."""


def run_session(
    site: Site, config: PilotConfig, instruction: Instruction, *, progress: Callable[[str], None]
) -> SessionResult:
    """Evaluate and train as the server instructs.

    The session starts from the newest private state of an earlier exchange, so a repeated exchange
    gives the same result.

    The incoming model is evaluated in the architecture that the client last trained: stage 1
    after its first training, CT-MoA after a stage-2 one. Before its first training it is
    stage 1 with an inert ψ_s: the base model with the task adapter and the LoRA that the
    server sent. In the first exchange these are the base model's own, so this is the untouched
    base model; a client that joins late receives aggregated ones.

    Raises `StateError` if the private state does not fit the instruction, `RunError` if another
    session of this client is still running here, another `PilotError` if the model, the data or
    the training fails. The private state on disk then stays as it was.
    """
    lock = site.state_folder / SESSION_LOCK
    with hold(lock, f"The state folder of client {site.client.id!r}", patience=PATIENCE_SECONDS):
        started = time.time()
        private = site.private_store.load(before=instruction.server_round)
        if instruction.train:
            site.check_budget(config.privacy)
            _check_stage(site, instruction, private)
        session = _prepare(site, config, instruction, private, progress)
        evaluation, result = None, SessionResult()
        if instruction.evaluate and not config.privacy.withholds_metrics:
            evaluation = session.evaluate_incoming()
        if instruction.train:
            result, trained = session.train_and_upload()
            site.private_store.save(trained, server_round=instruction.server_round)
        return replace(
            result, evaluation=evaluation, started=started, seconds=time.time() - started
        )


def session_generator(seed: int, client_id: str, server_round: int) -> torch.Generator:
    """Return the generator of one client's session, the same however clients are scheduled."""
    text = f"{seed}/{client_id}/{server_round}".encode()
    return torch.Generator().manual_seed(zlib.crc32(text) + (zlib.adler32(text) << 32))


def _check_stage(site: Site, instruction: Instruction, private: PrivateState | None) -> None:
    if instruction.stage == 2 and private is None:
        raise StateError(
            f"Client {site.client.id!r} was asked to train stage 2 but holds no stage-1 state."
        )


def _prepare(
    site: Site,
    config: PilotConfig,
    instruction: Instruction,
    private: PrivateState | None,
    progress: Callable[[str], None],
) -> "Session":
    """Get the warm model and the client's data ready."""
    device = find_device(site.device)
    reduction = config.train.difference_loss.reduction
    with out_of_memory_explained(config, instruction.stage):
        model = loaded_model(config.model, reduction=reduction, device=device)
    data = ClientData(
        site.client,
        config,
        model,
        folder=site.state_folder,
        files=site.files,
        progress=progress,
    )
    if instruction.train:
        data.examples("train")  # broken data ends the session now, not after the evaluation
    return Session(site, config, instruction, private, model, data)


@dataclass(frozen=True)
class Session:
    """What one session works with; `private` is the state it starts from."""

    site: Site
    config: PilotConfig
    instruction: Instruction
    private: PrivateState | None
    model: PilotModel
    data: ClientData

    @property
    def sharing(self) -> Sharing:
        """What the run trains, sends and leaves on the client."""
        return Sharing.of(self.config.strategy.sharing, self.config.train.lora_matrices)

    @property
    def received(self) -> Received:
        """The server's share of the client's model."""
        sent = self.instruction
        return Received(
            self.site.client.task,
            sent.tasks,
            sent.adapters,
            sent.lora,
            sent.residual,
            self.sharing,
            self.config.seed,
        )

    def evaluate_incoming(self) -> EvaluationResult:
        """Evaluate the incoming personalised model on the client's test split."""
        personalize_as_trained(self.model, self.private, self.received)
        with out_of_memory_explained(self.config, self.model.stage):
            return evaluate(
                self.model,
                self.data.examples("test"),
                collator=self.data.collator,
                encode=self.data.encoder("test"),
                metric=self.data.metric,
                config=self.config.evaluation,
                autocast_choice=self.config.train.autocast,
            )

    def train_and_upload(self) -> tuple[SessionResult, PrivateState]:
        """Train in the instruction's stage; return what leaves the client and what stays."""
        generator = session_generator(
            self.config.seed, self.site.client.id, self.instruction.server_round
        )
        self._personalize(generator)
        weight = self.config.train.proximal_weight
        sent = sent_parameters(self.model, self.sharing) if weight > 0 else []
        with out_of_memory_explained(self.config, self.model.stage):
            training = self._fit(generator, Proximal(sent, weight) if sent else None)
        check_finite(self.model)
        result, trained = self._upload(), extract_private_state(self.model, self.sharing)
        if self.config.train.ditto.enabled:
            personal, second = self.train_personal(generator)
            trained = replace(trained, personal=personal)
            training = replace(
                training,
                steps=training.steps + second.steps,
                seconds=training.seconds + second.seconds,
            )
        if self.config.privacy.withholds_metrics:
            training = replace(training, losses={})
        return replace(result, training=training), trained

    def train_personal(
        self, generator: torch.Generator
    ) -> tuple[dict[GroupName, State], TrainingResult]:
        """Train Ditto's v with a pull to w as it was sent; return v by group."""
        self._personalize(generator)
        weight = self.config.train.ditto.weight
        pull = Proximal(sent_parameters(self.model, self.sharing), weight)
        if self.private is not None:
            if self.private.personal.keys() != set(SHARED):
                raise StateError(
                    "The private state holds no personal model: it is from a run without "
                    "`train.ditto.enabled`."
                )
            for group, state in self.private.personal.items():
                self.model.load(group, state)
        result = self._fit(generator, pull)
        check_finite(self.model)
        return {group: self.model.state(group) for group in SHARED}, result

    def _personalize(self, generator: torch.Generator) -> None:
        stage = self.instruction.stage
        personalize(self.model, self.private, self.received, stage=stage, generator=generator)

    def _fit(self, generator: torch.Generator, proximal: Proximal | None) -> TrainingResult:
        """Train the model, as it is, on the client's training split."""
        config = self.config.train
        if config.ditto.enabled:  # half of the epochs for each of two models
            config = replace(config, epochs=config.epochs // 2, ditto=DittoConfig())
        return train(
            self.model,
            self.data.examples("train"),
            collator=self.data.collator,
            encode=self.data.encoder("train"),
            config=config,
            generator=generator,
            progress=self.data.progress,
            proximal=proximal,
        )

    def _upload(self) -> SessionResult:
        """Return what leaves the client; a private run's release is counted before it is made."""
        privacy = self.config.privacy
        upload: dict[GroupName, State] = {
            group: {
                n: t for n, t in self.model.state(group).items() if self.sharing.sends(group, n)
            }
            for group in SHARED
        }
        spent = None
        if privacy.enabled:
            sent: dict[GroupName, State] = {
                "own_task_adapter": self.instruction.adapters.get(self.site.client.task, {}),
                "lora": self.instruction.lora,
            }
            spent = self.site.account.spend(
                privacy,
                run=self.site.run,
                server_round=self.instruction.server_round,
                check=lambda: self.site.check_budget(privacy),
            )
            upload, clipping = release(
                upload,
                sent,
                clip_norm=privacy.clip_norm,
                noise_multiplier=privacy.noise_multiplier,
            )
            self.data.progress(
                f"upload of norm {clipping.norm:.4g} scaled by {clipping.factor:.3g}, noise added; "
                f"at δ = {spent.delta:g}, ε = {spent.epsilon:.4g} in this run "
                f"({count(spent.releases, 'release')}) and {spent.total_epsilon:.4g} over all runs "
                f"({count(spent.total_releases, 'release')})"
            )
        dtype = getattr(torch, self.model.config.wire_dtype)
        adapter, lora = ({n: t.to(dtype) for n, t in upload[group].items()} for group in SHARED)
        return SessionResult(adapter, lora, spent=spent)
