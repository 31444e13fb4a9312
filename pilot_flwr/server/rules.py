"""How a round's uploads are aggregated, by `strategy.adapters` and `strategy.lora`.

To add a rule for the LoRAs, write one pure function that returns mixing weights (see
`pilot_flwr.aggregation`) and add a row to `LORA_RULES`; docs/methods.md says what each row is.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pilot_flwr.aggregation import adaptive_weights, group_weights
from pilot_flwr.arrays import Matrix
from pilot_flwr.settings.strategy import StrategyConfig

EVERYONE = "all-tasks"
"""Name of the group that all clients are in."""

GroupOf = Callable[[str], str]
"""From a client's task to the group that it is averaged with."""

ADAPTER_GROUPS: dict[str, GroupOf] = {"task": lambda task: task, "global": lambda task: EVERYONE}
"""Whose task adapters are averaged together, by `strategy.adapters`."""


class LoraRule(NamedTuple):
    """How LoRAs are mixed.

    Attributes
    ----------
    weights : callable
        From distances (K, K), tasks (K,), examples (K,) and the settings to mixing weights
        (K, K), row-stochastic.
    owner : callable
        From a client and its task to what its LoRA is the LoRA of: itself, or its group. All
        clients of one owner have one and the same, also those that did not reply.
    exact : bool
        Whether what the means of the factors leave out is added to the frozen base.
    """

    weights: Callable[[Matrix, Sequence[str], Sequence[float], StrategyConfig], Matrix]
    owner: Callable[[str, str], str]
    exact: bool = False


def _adaptive(
    distances: Matrix, tasks: Sequence[str], examples: Sequence[float], config: StrategyConfig
) -> Matrix:
    return adaptive_weights(
        distances, examples, config.num_neighbors, self_weight=config.self_weight
    )


def _mean_over(group_of: GroupOf) -> LoraRule:
    return LoraRule(
        lambda distances, tasks, examples, config: group_weights(
            [group_of(task) for task in tasks], examples
        ),
        lambda client, task: group_of(task),
    )


LORA_RULES: dict[str, LoraRule] = {
    "adaptive": LoraRule(_adaptive, lambda client, task: client),
    "task": _mean_over(ADAPTER_GROUPS["task"]),
    "global": _mean_over(ADAPTER_GROUPS["global"]),
    "exact": _mean_over(ADAPTER_GROUPS["global"])._replace(exact=True),
}
"""How LoRAs are mixed, by `strategy.lora`."""
