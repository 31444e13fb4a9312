"""The server's state of a federation, and its change by an exchange.

`ServerState.check` validates one update, `ServerState.aggregate` aggregates an exchange's, and
`adam_step` is the optional server optimizer (docs/explanation/method.md, section 4).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pilot_flwr.algorithm.aggregation import (
    ADAPTER_GROUPS,
    EVERYONE,
    LORA_RULES,
    mix,
    pairwise_distances,
    task_aware_average,
    weighted_average,
)
from pilot_flwr.algorithm.arrays import Array, Matrix, check_tensors, layout_difference
from pilot_flwr.algorithm.fedex_lora import product_residual
from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.algorithm.quantization import restore
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import Member, State, Update


class InitialState(NamedTuple):
    """Initial ψ_t (the pretrained projector) and Θ_l of a federation, in `model.sent_dtype`."""

    adapter: State
    lora: State

    def sent(self, sharing: Sharing) -> "InitialState":
        """Return the shared part; the server holds no more."""
        return InitialState(
            {n: t for n, t in self.adapter.items() if sharing.sends("own_task_adapter", n)},
            {n: t for n, t in self.lora.items() if sharing.sends("lora", n)},
        )


def draw_lora(shapes: Mapping[str, torch.Size], dtype: torch.dtype, *, seed: int) -> State:
    """Draw the initial Θ_l, as in peft: A uniform in ±1/√(inputs), B zero.

    `shapes` has all tensors in the model's order, and `seed` is the run's: clients draw the tensors
    that are never sent as the server does.
    """
    generator = torch.Generator().manual_seed(seed)
    lora: State = {}
    for name, shape in shapes.items():
        lora[name] = torch.zeros(shape, dtype=dtype)
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(shape[1])
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            lora[name] = drawn.to(dtype)
    return lora


class Moments(NamedTuple):
    """Adam's m and v of one average, in float32, after `steps` steps."""

    steps: int
    first: State
    second: State

    def pack(self) -> dict[str, Tensor]:
        """Return all moments as named tensors."""
        return {
            "steps": torch.tensor(self.steps),
            **{f"first/{name}": tensor for name, tensor in self.first.items()},
            **{f"second/{name}": tensor for name, tensor in self.second.items()},
        }

    @classmethod
    def unpack(cls, tensors: State, pattern: State) -> "Moments":
        """Invert `pack`; tensors are in the order of `pattern`.

        Raises
        ------
        KeyError, ValueError
            The tensors do not fit a state like `pattern`.
        """
        expected = {
            f"{kind}/{name}": tensor.new_empty(tensor.shape, dtype=torch.float32, device="meta")
            for kind in ("first", "second")
            for name, tensor in pattern.items()
        }
        found = {name: tensor for name, tensor in tensors.items() if name != "steps"}
        if difference := layout_difference(found, expected):
            raise ValueError(f"they do not fit the configured model: {difference}")
        first, second = (
            {n: tensors[f"{kind}/{n}"] for n in pattern} for kind in ("first", "second")
        )
        return cls(int(tensors["steps"]), first, second)


def adam_step(
    current: State,
    average: State,
    moments: Moments | None,
    *,
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    tau: float,
) -> tuple[dict[str, Tensor], Moments]:
    """FedAdam: step from the state sent to clients towards the average of their uploads.

    ::

        Δ = average − current
        m ← β1 m + (1 − β1) Δ          v ← β2 v + (1 − β2) Δ²          both start at 0
        new = current + η_t m / (√v + τ),    η_t = η √(1 − β2^(t+1)) / (1 − β1^(t+1))

    Parameters
    ----------
    current : State
        Sent to the clients.
    average : State
        Of the same names, shapes and dtypes.
    moments : Moments or None
        Of the previous step; None at the first.
    learning_rate, beta_1, beta_2, tau : float
        η, β1, β2 and τ.

    Returns
    -------
    State, Moments
        The state to send next, in the dtype of `current`; computed in float64.

    Notes
    -----
    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295). Follows
    Flower's ``FedAdam``, for comparable figures, which differs from their Algorithm 2 in three
    points: η_t replaces a constant η (its exponent t + 1 makes it 0.74 η at the first step, with
    β1 = 0.9 and β2 = 0.99), v starts at 0, not at τ² or more, and the average is weighted by
    examples. For another optimizer of the paper, write such a function with its own second moment.
    """
    steps = 1 if moments is None else moments.steps + 1
    rate = learning_rate * (1 - beta_2 ** (steps + 1)) ** 0.5 / (1 - beta_1 ** (steps + 1))
    new: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, tensor in current.items():
        start = tensor.double()
        delta = average[name].double() - start
        zero = torch.zeros_like(delta)
        m = beta_1 * (moments.first[name].double() if moments else zero) + (1 - beta_1) * delta
        v = beta_2 * (moments.second[name].double() if moments else zero) + (1 - beta_2) * delta**2
        new[name] = (start + rate * m / (v.sqrt() + tau)).to(tensor.dtype)
        first[name], second[name] = m.float(), v.float()
    return new, Moments(steps, first, second)


def _in_memory(state: State) -> State:
    return state


@dataclass(frozen=True)
class Aggregation:
    """Record of an exchange's aggregation; `clients` are the senders of its updates, sorted."""

    clients: list[str]
    tasks: dict[str, list[str]]
    """Group (a task, or `EVERYONE`) → clients whose adapters were averaged."""
    neighbors: Matrix | None
    """Weights (K, K) of the clients' LoRAs in every client's Θ̄_l; None if LoRAs are not shared."""
    distances: Matrix | None
    """‖Θ_l,k − Θ_l,j‖₂ (K, K), or None."""


@dataclass
class ServerState:
    """Consensus task adapters and personalised LoRAs; `tasks` are in the federation's order."""

    tasks: tuple[str, ...]
    initial: InitialState
    adapters: dict[str, State] = field(default_factory=dict)
    """Task → ψ_t."""
    loras: dict[str, State] = field(default_factory=dict)
    """Client → Θ̄_l, of clients that have trained."""
    task_of: dict[str, str] = field(default_factory=dict)
    """Client → task, of the same clients."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """Moments of the server optimizer, by ``adapter.<group>`` or ``lora.<group or client>``."""
    residual: State = field(default_factory=dict)
    """LoRA that ``strategy.lora=exact`` adds to the frozen base of every client."""
    rounds: int = 0
    """Aggregated exchanges."""
    _means: dict[str, State] = field(default_factory=dict)
    """Task → LoRA of its newcomers, since the last aggregation."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            self.adapters.setdefault(task, self.initial.adapter)

    def stage_for(self, member: Member, stages: int = 2) -> int:
        """Return the stage that a client trains next, at most `stages` (`strategy.stages`).

        It is 2 once both client and server have completed stage 1.
        """
        return min(stages, 2) if self.rounds > 0 and member.stage_trained > 0 else 1

    def lora_for(self, client: str, task: str) -> State:
        """Return the `current_lora` of a client, or Θ_l⁰ before any client has trained."""
        if client in self.loras:
            return self.loras[client]
        if task not in self._means:
            lora = current_lora(self.task_of, self.loras.__getitem__, task)
            self._means[task] = self.initial.lora if lora is None else lora
        return self._means[task]

    def restore(self, update: Update, member: Member, bits: int) -> Update:
        """Restore a compressed update of `bits` bits from what its client was sent.

        Raises
        ------
        UpdateError
            As :func:`pilot_flwr.algorithm.quantization.restore`; it names the part.
        """
        sent = {
            "adapter": self.adapters[member.task],
            "lora": self.lora_for(member.client, member.task),
        }
        parts: dict[str, Any] = {p: restore(getattr(update, p), s, bits) for p, s in sent.items()}
        return replace(update, **parts)

    def check(self, update: Update, member: Member, server_round: int) -> None:
        """Validate an update.

        Raises
        ------
        UpdateError
            It names another client, exchange or task, counts no examples or more than declared, or
            has tensors of another layout or values that are not finite.
        """
        if update.client != member.client:
            raise UpdateError(f"it claims to be from {update.client!r}")
        if update.server_round != server_round:
            raise UpdateError(f"it is for exchange {update.server_round}, not {server_round}")
        if update.task != member.task or update.task not in self.tasks:
            raise UpdateError(
                f"its task is {update.task!r} but the client's is {member.task!r}, of "
                f"{', '.join(self.tasks)}"
            )
        if not 1 <= update.num_examples <= member.examples:
            raise UpdateError(
                f"it counts {update.num_examples} examples but must count 1 to "
                f"{member.examples}, as the client declared"
            )
        check_tensors("task adapter", update.adapter, self.initial.adapter)
        check_tensors("LoRA", update.lora, self.initial.lora)

    def aggregate(
        self,
        updates: Sequence[Update],
        config: StrategyConfig,
        *,
        allocate: Callable[[str], State] | None = None,
        keep: Callable[[State], State] = _in_memory,
    ) -> Aggregation:
        """Average the task adapters per task and mix the LoRAs, in place.

        Parameters
        ----------
        updates : sequence of Update
            Each accepted by `check`.
        config : StrategyConfig
            Aggregation rules.
        allocate : callable, optional
            Maps a client to a state like `initial.lora`, which its new LoRA is written into. By
            default, new LoRAs are in memory.
        keep : callable
            Returns a copy of a state where the server optimizer's mixtures, LoRAs and moments are
            stored. By default, they stay in memory.

        Raises
        ------
        UpdateError
            There is no update.
        """
        updates = sorted(updates, key=lambda update: update.client)
        if not updates:
            raise UpdateError("There is no update to aggregate.")
        averaged = self._average_adapters(updates, config)
        neighbors, distances = self._mix_loras(updates, config, allocate, keep)
        self._means.clear()
        self.task_of |= {update.client: update.task for update in updates}
        self.rounds += 1
        return Aggregation([u.client for u in updates], averaged, neighbors, distances)

    def _average_adapters(
        self, updates: Sequence[Update], config: StrategyConfig
    ) -> dict[str, list[str]]:
        """Average the task adapters in place; return the clients of each group."""
        if not self.initial.adapter:
            return {}
        group_of = ADAPTER_GROUPS[config.adapters]
        groups = [group_of(update.task) for update in updates]
        averages = task_aware_average(
            [update.adapter for update in updates], groups, [u.num_examples for u in updates]
        )
        starts = {group_of(task): adapter for task, adapter in self.adapters.items()}
        ordered = {
            group: self._stepped(f"adapter.{group}", starts[group], average, config)
            for group, average in averages.items()
        }
        self.adapters |= {t: ordered[g] for t in self.tasks if (g := group_of(t)) in ordered}
        return {
            group: [u.client for u, g in zip(updates, groups, strict=True) if g == group]
            for group in sorted(ordered)
        }

    def _mix_loras(
        self,
        updates: Sequence[Update],
        config: StrategyConfig,
        allocate: Callable[[str], State] | None,
        keep: Callable[[State], State],
    ) -> tuple[Matrix | None, Matrix | None]:
        """Mix the LoRAs in place; return weights and distances, None if LoRAs are not shared."""
        if not self.initial.lora:
            self.loras |= dict.fromkeys((update.client for update in updates), self.initial.lora)
            return None, None
        clients, tasks = [u.client for u in updates], [u.task for u in updates]
        loras, examples = [u.lora for u in updates], [u.num_examples for u in updates]
        rule, distances = LORA_RULES[config.lora], pairwise_distances(loras)
        weights = rule.weights(distances, tasks, examples, config)
        new: dict[str, State] = {}
        place: Callable[[int], dict[str, Array]] | None = None
        if allocate is not None:
            # The server optimizer replaces the mixtures, so they do not become anyone's LoRA.
            own = config.server_optimizer.name == "none"
            place = lambda row: cast(  # noqa: E731
                dict[str, Array], allocate(clients[row]) if own else keep(self.initial.lora)
            )
        mixed = mix(loras, weights, allocate=place)
        for client, task, lora in zip(clients, tasks, mixed, strict=True):
            owner = rule.owner(client, task)
            if owner not in new:
                start = self.lora_for(client, task)
                new[owner] = self._stepped(f"lora.{owner}", start, lora, config, keep)
        if rule.exact:
            self.residual = _state(product_residual(loras, examples, new[EVERYONE], self.residual))
        for client, task in (self.task_of | dict(zip(clients, tasks, strict=True))).items():
            if (owner := rule.owner(client, task)) in new:
                self.loras[client] = new[owner]
        return weights, distances

    def _stepped(
        self,
        target: str,
        start: State,
        average: Mapping[str, Array],
        config: StrategyConfig,
        keep: Callable[[State], State] = _in_memory,
    ) -> State:
        """Return the new state: the average, or the server optimizer's step towards it."""
        # In the server's order, so that sums do not depend on a client's.
        if [*average] != [*start]:
            average = {name: average[name] for name in start}
        state = _state(average)
        optimizer = config.server_optimizer
        if optimizer.name == "none":
            return state
        new, moments = adam_step(
            start,
            state,
            self.moments.get(target),
            learning_rate=optimizer.learning_rate,
            beta_1=optimizer.beta_1,
            beta_2=optimizer.beta_2,
            tau=optimizer.tau,
        )
        first, second = keep(moments.first), keep(moments.second)
        self.moments[target] = Moments(moments.steps, first, second)
        return keep(new)


def current_lora(
    task_of: Mapping[str, str], load: Callable[[str], State], task: str, client: str = ""
) -> State | None:
    """Return a client's Θ̄_l: its own, else the mean of its task's clients', else of all clients'.

    Parameters
    ----------
    task_of : Mapping[str, str]
        Task of every client that has a LoRA.
    load : callable
        Maps a client to its LoRA.
    task, client : str
        Task and id; without `client`, the mean of the task.

    Returns
    -------
    State or None
        Without tensors if LoRAs are not shared; None if no client has trained.
    """
    if client in task_of:
        return load(client)
    peers = sorted(c for c, other in task_of.items() if other == task) or sorted(task_of)
    if not peers:
        return None
    loras = [load(peer) for peer in peers]
    return _state(weighted_average(loras, [1] * len(loras))) if any(loras) else {}


def _state(arrays: Mapping[str, Array]) -> State:
    """Narrow the type: aggregating tensors yields tensors."""
    return cast(State, arrays)
