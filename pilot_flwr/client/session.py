"""One client's turn: evaluate the incoming personalised model, then train it.

This is the client side of the algorithm without a word of Flower. The base model stays warm
in the process; what makes it this client's model is loaded from the order (what the server
sent) and from the client's own disk (what never leaves it).

Ditto: a personal model beside the shared one (Li et al., ICML 2021, arXiv 2012.04221).

In every turn a client trains the shared model w as without Ditto, and then a personal one, v, on
its own loss F_k and a pull to the shared one as the server sent it (algorithm 1, lines 5 to 8)::

    min over v of   F_k(v) + λ / 2 · ‖v − w_sent‖²

v begins as the first w that is sent, never leaves the client, and is what the client is evaluated
by. Each of the two has half of the turn's epochs, so that a turn takes as many steps as another
method's.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import replace

import torch

from pilot_flwr.algorithm.parameter_groups import GROUPS, Sharing
from pilot_flwr.client.client_data import Kit
from pilot_flwr.client.node import Site
from pilot_flwr.client.personalization import assemble, enter_own, enter_stage2, load_received
from pilot_flwr.client.privacy import release
from pilot_flwr.client.privacy_accountant import require_accounting
from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.client.training import Proximal, check_finite, sent_parameters
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import StateError
from pilot_flwr.formatting import count
from pilot_flwr.model.loading import warm_model
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.resource_plan import out_of_memory_explained
from pilot_flwr.protocol import GroupName, Instruction, SessionResult, State, TrainingResult
from pilot_flwr.run.atomic import hold

TURN_LOCK = ".turn.lock"
"""File in a client's state folder: one turn at a time, as each ends by replacing the state."""

PATIENCE_SECONDS = 60.0
"""How long a turn waits for one before it, of which the server may have lost patience."""


def stage_trained(site: Site, server_round: int) -> int:
    """Return the last stage that this client trained before an exchange, 0 if none."""
    return private_store(site).stage(before=server_round)


def private_store(site: Site) -> PrivateStore:
    """Return where the client's private states of this run are."""
    return PrivateStore(site.state_folder, site.client.id, site.client.task)


def check_budget(site: Site, config: PilotConfig) -> None:
    """Say whether one more upload is within what this site allows; nothing is looked at if not.

    Raises
    ------
    PilotError
        It is not, or its privacy account cannot be kept.
    """
    if config.privacy.enabled:
        require_accounting()
        delta = site.demands.delta
        site.demands.check_budget(site.account.epsilon_after(config.privacy, delta))


def run_session(
    site: Site, config: PilotConfig, order: Instruction, *, progress: Callable[[str], None]
) -> SessionResult:
    """Evaluate and train as `order` says.

    The turn starts from the newest private state of an exchange before the ordered one, so that
    an exchange that is ordered again is repeated exactly.

    The incoming model is evaluated in the architecture that the client last trained: stage 1
    after its first training, CT-MoA after a stage-2 one. Before its first training it is
    stage 1 with an inert ψ_s: the base model with the task adapter and the LoRA that the
    server sent. In the first exchange these are the base model's own, so this is the untouched
    base model; a client that joins late is sent aggregated ones.

    Raises
    ------
    StateError
        Stage 2 is ordered but this client holds no stage-1 state, or one for other tasks.
    RunError
        Another turn of this client is still at work here.
    PilotError
        The model, the data or the training fails; the private state on disk is as before.
    """
    lock = site.state_folder / TURN_LOCK
    with hold(lock, f"The state folder of client {site.client.id!r}", patience=PATIENCE_SECONDS):
        return _take_turn(site, config, order, progress)


def _take_turn(
    site: Site, config: PilotConfig, order: Instruction, progress: Callable[[str], None]
) -> SessionResult:
    started = time.time()
    store = private_store(site)
    private = store.load(before=order.server_round)
    if order.train:
        check_budget(site, config)
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
    if order.evaluate and not config.privacy.withholds_metrics:
        assemble(
            model,
            site.client.task,
            private,
            adapters=order.adapters,
            lora=order.lora,
            tasks=order.tasks,
            sharing=kit.sharing,
            seed=config.seed,
            residual=order.residual,
        )
        with out_of_memory_explained(config, model.stage):
            evaluation = kit.evaluate()
    done = SessionResult()
    if order.train:
        generator = turn_generator(config.seed, site.client.id, order.server_round)
        _enter_ordered_architecture(kit, private, order, generator)
        with out_of_memory_explained(config, model.stage):
            training = kit.train(generator)
        check_finite(model)
        done = _upload(model, training, kit, order)
        state = _private_state(model, kit.sharing)
        if config.train.ditto.enabled and done.training:
            _load(kit, private, order)
            personal, second = train_personal(kit, private, generator)
            state = replace(state, personal=personal)
            done = replace(done, training=both(done.training, second))
        store.save(state, server_round=order.server_round)
    return replace(done, evaluation=evaluation, started=started, seconds=time.time() - started)


def _upload(
    model: PilotModel, training: TrainingResult, kit: Kit, order: Instruction
) -> SessionResult:
    """Return what leaves the client; a private run's release is counted before it is made."""
    site, privacy = kit.site, kit.config.privacy
    shared: tuple[GroupName, ...] = ("own_task_adapter", "lora")
    upload: dict[GroupName, State] = {
        group: {n: t for n, t in model.state(group).items() if kit.sharing.sends(group, n)}
        for group in shared
    }
    spent = None
    if privacy.enabled:
        sent: dict[GroupName, State] = {
            "own_task_adapter": order.adapters.get(site.client.task, {}),
            "lora": order.lora,
        }
        spent = site.account.spend(
            privacy,
            run=site.run,
            server_round=order.server_round,
            check=lambda: check_budget(site, kit.config),
        )
        upload, clipping = release(
            upload,
            sent,
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
        )
        kit.progress(
            f"upload of norm {clipping.norm:.4g} scaled by {clipping.factor:.3g}, noise added; now "
            f"ε = {spent.epsilon:.4g} in this run and {spent.total_epsilon:.4g} in all, at "
            f"δ = {spent.delta:g} ({spent.releases} and {count(spent.total_releases, 'release')})"
        )
    if privacy.withholds_metrics:
        training = replace(training, losses={})
    adapter, lora = (_to_send(model, upload[group]) for group in shared)
    return SessionResult(adapter, lora, training, spent=spent)


def _to_send(model: PilotModel, state: State) -> State:
    dtype = getattr(torch, model.config.wire_dtype)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def turn_generator(seed: int, client_id: str, server_round: int) -> torch.Generator:
    """Return the generator of one client's turn, the same however clients are scheduled."""
    text = f"{seed}/{client_id}/{server_round}".encode()
    return torch.Generator().manual_seed(zlib.crc32(text) + (zlib.adler32(text) << 32))


def _enter_ordered_architecture(
    kit: Kit, private: PrivateState | None, order: Instruction, generator: torch.Generator
) -> None:
    model, task = kit.model, kit.site.client.task
    if private is None:
        model.enter_stage1(task)
    else:
        enter_own(model, task, private)
        if order.stage == 2:
            enter_stage2(model, private, order.tasks, generator)
    _load(kit, private, order)


def _load(kit: Kit, private: PrivateState | None, order: Instruction) -> None:
    load_received(
        kit.model,
        private,
        order.adapters,
        order.lora,
        sharing=kit.sharing,
        seed=kit.config.seed,
        residual=order.residual,
    )


def _private_state(model: PilotModel, sharing: Sharing) -> PrivateState:
    tasks = getattr(model.connector, "tasks", ())
    groups: dict[GroupName, State] = {}
    for group, row in GROUPS.items():
        kept = {n: t for n, t in model.state(group).items() if sharing.keeps(group, n)}
        if kept or row.private:
            groups[group] = kept
    return PrivateState(model.stage, tasks, groups)


PERSONAL: tuple[GroupName, ...] = ("lora", "own_task_adapter")
"""What v is made of."""


def train_personal(
    kit: Kit, private: PrivateState | None, generator: torch.Generator
) -> tuple[dict[GroupName, State], TrainingResult]:
    """Train v, in place of the model that the server sent.

    Parameters
    ----------
    kit : Kit
        Its model holds w as it was sent.
    private : PrivateState or None
        Holds v of the turn before, if there was one.
    generator : torch.Generator
        Of the order of examples and of dropout.

    Returns
    -------
    dict, TrainingResult
        v, by group, and what happened.

    Raises
    ------
    StateError
        The client has trained in this run, but without a personal model.
    TrainingError
        As in `pilot_flwr.client.training.train`.
    """
    model = kit.model
    pull = Proximal(sent_parameters(model, kit.sharing), kit.config.train.ditto.weight)
    if private is not None:
        if private.personal.keys() != set(PERSONAL):
            raise StateError(
                "The private state holds no personal model: it is of a run without "
                "`train.ditto.enabled`."
            )
        for group, state in private.personal.items():
            model.load(group, state)
    result = kit.fit(generator, pull)
    check_finite(model)
    return {group: model.state(group) for group in PERSONAL}, result


def both(shared: TrainingResult, personal: TrainingResult) -> TrainingResult:
    """Return what is reported of a turn: steps and time of both trainings, w's losses."""
    return replace(
        shared,
        steps=shared.steps + personal.steps,
        seconds=shared.seconds + personal.seconds,
    )
