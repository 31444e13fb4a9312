"""What server and clients tell each other, declared once; no torch at import time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    State: TypeAlias = dict[str, Tensor]
    """Named tensors of one group."""
else:
    State = dict  # torch costs seconds to import, and this module is imported everywhere

GroupName = Literal[
    "lora",
    "residual",
    "own_task_adapter",
    "foreign_task_adapters",
    "client_adapter",
    "cross_task_adapters",
    "router",
    "base",
]

LOSSES = ("total", "ce", "difference", "balance", "z", "proximal")
"""Names of the losses: the total with, its parts without coefficients."""

Losses: TypeAlias = dict[str, float]
"""Mean over the optimizer steps, by name."""


@dataclass(frozen=True)
class Instruction:
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
        Task → ψ_t: all T in stage 2, the own one alone in stage 1; none if they are not shared.
    lora : State
        This client's Θ̄_l, of its tensors those that are shared.
    residual : State
        What exact aggregation has added to everyone's frozen base.
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
    residual: State = field(default_factory=dict)


@dataclass(frozen=True)
class SessionResult:
    """What a turn gives back; `adapter` and `lora` are the only parameters that are sent.

    They have the tensors that `strategy.sharing` names, and may have none.
    `started` is in seconds since 1970, `seconds` is the whole turn's wall time. `spent` is what
    the client's privacy account says if `adapter` and `lora` are clipped and noisy.
    """

    adapter: State = field(default_factory=dict)
    lora: State = field(default_factory=dict)
    training: TrainingResult | None = None
    evaluation: EvaluationResult | None = None
    spent: Spent | None = None
    started: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainingResult:
    """What happened in one local training.

    Attributes
    ----------
    losses : Losses
        All of `LOSSES`.
    steps, examples : int
        Optimizer steps taken; examples of the data set (not times epochs).
    seconds : float
        Wall time.
    gradients : dict
        Group → number of its parameters (elements) that received a gradient.
    """

    losses: Losses
    steps: int
    examples: int
    seconds: float
    gradients: dict[GroupName, int]


@dataclass(frozen=True)
class EvaluationResult:
    """Score of one client's test split.

    Attributes
    ----------
    score : float
        From 0 to the metric's maximum.
    metric : str
        A key of `pilot_flwr.metrics.registry.METRICS`.
    examples : int
        Size of the split.
    seconds : float
        Wall time.
    approximate : bool
        Whether the figure is not exactly what the metric's own script gives.
    cut : int
        Answers that `evaluation.max_new_tokens` ended, not the model.
    """

    score: float
    metric: str
    examples: int
    seconds: float
    approximate: bool = False
    cut: int = 0


@dataclass(frozen=True)
class Member:
    """A client in the roster.

    Attributes
    ----------
    client, task : str
        Its id and its one task.
    examples : int
        Training examples that it declared.
    stage_trained : int
        Last stage that it holds a private state of, 0 if none.
    """

    client: str
    task: str
    examples: int
    stage_trained: int


@dataclass(frozen=True)
class Update:
    """One client's contribution to one round: Θ_a, Θ_l and n_k."""

    client: str
    task: str
    server_round: int
    num_examples: int
    adapter: State
    lora: State


@dataclass(frozen=True)
class Report:
    """What a reply says besides its tensors; every number is finite and in range.

    Attributes
    ----------
    training : dict or None
        ``steps``, ``seconds`` and ``loss.<name>``, if the client trained. A client that makes
        its upload private may keep the losses to itself: all of them, or none.
    gradients : dict
        Group → number of its parameters that received a gradient.
    evaluation : EvaluationResult or None
        Score of the incoming model, if it was evaluated.
    times : dict
        ``started`` (seconds since 1970) and ``turn_seconds`` of the whole turn.
    sizes : dict
        Bytes of the reply's arrays, see `num_bytes`.
    privacy : dict or None
        ``epsilon``, ``delta`` and ``releases`` of the run so far, if the upload was made private.
    """

    training: dict[str, float] | None
    gradients: dict[str, int]
    evaluation: EvaluationResult | None
    times: dict[str, float]
    sizes: dict[str, int]
    privacy: dict[str, float] | None = None


@dataclass(frozen=True)
class Spent:
    """What a client has spent, the release that is being made included.

    Attributes
    ----------
    epsilon : float
        ε of this run's releases.
    total_epsilon : float
        ε of all releases in the account, earlier runs' included.
    delta : float
        The δ that both are for.
    releases, total_releases : int
        How many there are.
    """

    epsilon: float
    total_epsilon: float
    delta: float
    releases: int
    total_releases: int
