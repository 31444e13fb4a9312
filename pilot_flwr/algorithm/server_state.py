"""The server's state of a federation, and its change by an exchange.

`ServerState.check` validates one update, `ServerState.aggregate` aggregates an exchange's
(docs/explanation/method.md, section 4).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch

from pilot_flwr.algorithm.aggregation import (
    ADAPTER_GROUPS,
    EVERYONE,
    LORA_RULES,
    mix,
    pairwise_distances,
    sketched_distances,
    task_aware_average,
)
from pilot_flwr.algorithm.arrays import Array, Matrix, check_tensors
from pilot_flwr.algorithm.fedex_lora import product_residual
from pilot_flwr.algorithm.lora_ranks import (
    at_rank,
    check_rank,
    mix_products,
    newcomer_lora,
    product_distances,
    rank_of,
    truncated,
)
from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.algorithm.quantization import restore
from pilot_flwr.algorithm.server_optimizer import Moments, adam_step
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
    """‖Θ_l,k − Θ_l,j‖₂ (K, K), exact or estimated, or None; of the products B A if ranks differ."""
    truncation: dict[str, float] = field(default_factory=dict)
    """Client → ‖M − B A‖ / ‖M‖ of its mixture M, if ranks differ."""


@dataclass
class ServerState:
    """Consensus task adapters and personalised LoRAs; `tasks` are in the federation's order."""

    tasks: tuple[str, ...]
    initial: InitialState
    adapters: dict[str, State] = field(default_factory=dict)
    """Task → ψ_t."""
    loras: dict[str, State] = field(default_factory=dict)
    """Client → Θ̄_l at the client's rank, of clients that have trained."""
    task_of: dict[str, str] = field(default_factory=dict)
    """Client → task, of the same clients."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """Moments of the server optimizer, by ``adapter.<group>`` or ``lora.<group or client>``."""
    residual: State = field(default_factory=dict)
    """LoRA that ``strategy.lora=exact`` adds to the frozen base of every client."""
    rounds: int = 0
    """Aggregated exchanges."""
    _means: dict[tuple[str, int], State] = field(default_factory=dict)
    """Task and rank → LoRA of its newcomers; cleared by every aggregation."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            self.adapters.setdefault(task, self.initial.adapter)

    def stage_for(self, member: Member, stages: int = 2) -> int:
        """Return the stage that a client trains next, at most `stages` (`strategy.stages`).

        It is 2 once both client and server have completed stage 1.
        """
        return min(stages, 2) if self.rounds > 0 and member.stage_trained > 0 else 1

    @property
    def rank(self) -> int:
        """LoRA rank of the federation, 0 if LoRAs are not shared."""
        return rank_of(self.initial.lora)

    def lora_for(self, client: str, task: str, rank: int = 0) -> State:
        """Return a client's Θ̄_l, or the `newcomer_lora` of its task.

        `rank` is the client's, or 0 for the federation's.
        """
        rank, spare = rank or self.rank, self.initial.lora
        if client in self.loras:
            return truncated(self.loras[client], rank, spare)  # a site may change its rank
        if (task, rank) not in self._means:
            load = self.loras.__getitem__
            lora = newcomer_lora(self.task_of, load, task, rank=rank, spare=spare)
            self._means[task, rank] = lora
        return self._means[task, rank]

    def restore(self, update: Update, member: Member, bits: int) -> Update:
        """Restore an update compressed to `bits` bits from the tensors that its client received.

        Raises
        ------
        UpdateError
            As :func:`pilot_flwr.algorithm.quantization.restore`; it names the part.
        """
        sent = {
            "adapter": self.adapters[member.task],
            "lora": self.lora_for(member.client, member.task, member.lora_rank),
        }
        parts: dict[str, Any] = {p: restore(getattr(update, p), s, bits) for p, s in sent.items()}
        return replace(update, **parts)

    def check(self, update: Update, member: Member, server_round: int) -> None:
        """Validate an update.

        Raises
        ------
        UpdateError
            It names another client, exchange or task, counts no examples or more than declared, or
            has tensors of another layout or rank or values that are not finite.
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
        rank = member.lora_rank or self.rank
        check_rank(update.lora, rank, self.rank)
        check_tensors("LoRA", update.lora, at_rank(self.initial.lora, rank))

    def aggregate(
        self,
        updates: Sequence[Update],
        config: StrategyConfig,
        *,
        seed: int = 0,
        allocate: Callable[[str, State], State] | None = None,
        keep: Callable[[State], State] = _in_memory,
    ) -> Aggregation:
        """Average the task adapters per task and mix the LoRAs, in place.

        Parameters
        ----------
        updates : sequence of Update
            Each accepted by `check`.
        config : StrategyConfig
            Aggregation rules.
        seed : int
            Seed of the run. Sketches of LoRAs depend on it and on the exchange.
        allocate : callable, optional
            Returns a state with the second argument's layout for the new LoRA of a client, given by
            its id. By default, new LoRAs are allocated in memory.
        keep : callable
            Stores a mixture, LoRA or moments of the server optimizer and returns the stored copy.
            By default, they stay in memory.

        Raises
        ------
        UpdateError
            There is no update.
        """
        updates = sorted(updates, key=lambda update: update.client)
        if not updates:
            raise UpdateError("There is no update to aggregate.")
        averaged = self._average_adapters(updates, config)
        if self._ranks_differ(updates):
            mixing = self._mix_products(updates, config, allocate)
        else:
            mixing = self._mix_loras(updates, config, seed, allocate, keep)
        self._means.clear()
        self.task_of |= {update.client: update.task for update in updates}
        self.rounds += 1
        return Aggregation([update.client for update in updates], averaged, *mixing)

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
        seed: int,
        allocate: Callable[[str, State], State] | None,
        keep: Callable[[State], State],
    ) -> tuple[Matrix | None, Matrix | None, dict[str, float]]:
        """Mix the LoRAs in place; return weights and distances, None if LoRAs are not shared."""
        if not self.initial.lora:
            self.loras |= dict.fromkeys((update.client for update in updates), self.initial.lora)
            return None, None, {}
        clients, tasks = [u.client for u in updates], [u.task for u in updates]
        loras, examples = [u.lora for u in updates], [u.num_examples for u in updates]
        if config.distances == "sketch":
            distances = sketched_distances(loras, seed=[seed, self.rounds])
        else:
            distances = pairwise_distances(loras)
        rule = LORA_RULES[config.lora]
        weights = rule.weights(distances, tasks, examples, config)
        new: dict[str, State] = {}
        place: Callable[[int], dict[str, Array]] | None = None
        if allocate is not None:
            # The server optimizer replaces the mixtures, so they are no client's LoRA.
            own = config.server_optimizer.name == "none"
            pattern = self.initial.lora
            place = lambda row: cast(  # noqa: E731
                dict[str, Array], allocate(clients[row], pattern) if own else keep(pattern)
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
        return weights, distances, {}

    def _ranks_differ(self, updates: Sequence[Update]) -> bool:
        """Return whether any client has had another rank than the federation's.

        Truncated factors have a basis of their own, so later exchanges mix products too, even if
        all ranks are equal.
        """
        loras = [*(update.lora for update in updates), *self.loras.values()]
        return any(rank_of(lora) != self.rank for lora in loras)

    def _mix_products(
        self,
        updates: Sequence[Update],
        config: StrategyConfig,
        allocate: Callable[[str, State], State] | None,
    ) -> tuple[Matrix | None, Matrix | None, dict[str, float]]:
        """Mix the products of the LoRAs in place; each result has its client's rank.

        Returns weights, distances and truncation errors. Clients that share a LoRA and sent no
        update get the new one, too.
        """
        rule, loras = LORA_RULES[config.lora], [u.lora for u in updates]
        distances = product_distances(loras)
        tasks, examples = [u.task for u in updates], [u.num_examples for u in updates]
        weights = rule.weights(distances, tasks, examples, config)
        results = {u.client: (row, rank_of(u.lora)) for row, u in enumerate(updates)}
        row_of = {rule.owner(u.client, u.task): row for row, u in reversed([*enumerate(updates)])}
        for client in sorted(self.task_of.keys() - results.keys()):
            if (owner := rule.owner(client, self.task_of[client])) in row_of:
                results[client] = row_of[owner], rank_of(self.loras[client])
        names = list(results)
        mixed = mix_products(
            loras,
            weights,
            list(results.values()),
            spare=self.initial.lora,
            allocate=allocate and (lambda index, layout: allocate(names[index], layout)),
        )
        found = dict(zip(names, mixed, strict=True))
        self.loras |= {client: one.lora for client, one in found.items()}
        return weights, distances, {u.client: found[u.client].error for u in updates}

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


def _state(arrays: Mapping[str, Array]) -> State:
    """Narrow the type: aggregating tensors yields tensors."""
    return cast(State, arrays)
