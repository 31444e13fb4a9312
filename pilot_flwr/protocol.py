"""Every message and record that server and clients exchange, declared once.

Records are frozen dataclasses without Flower types; `pilot_flwr.flower.messages` encodes and
decodes them. Symbols are those of docs/explanation/method.md, section 1. Importing this module does
not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    State: TypeAlias = dict[str, Tensor]
    """Named tensors of one parameter group."""
else:
    State = dict  # torch takes seconds to import, and every entry point imports this module

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
"""Parameter groups; `pilot_flwr.algorithm.parameter_groups.GROUPS` defines each."""

LOSSES = ("total", "ce", "difference", "balance", "z", "proximal", "distillation")
"""The total loss, with coefficients, then its terms, the last two with theirs."""

Losses: TypeAlias = dict[str, float]
"""Mean over the optimizer steps, by name."""


@dataclass(frozen=True)
class RunInfo:
    """Identifies the run; part of every message from the server.

    Attributes
    ----------
    name : str
        Separates this run's private states from those of other runs.
    folder : str
        Run folder on the server; used only by clients simulated on the same machine.
    token : str
        Content of a file in `folder`, which proves that client and server see the same folder.
    """

    name: str
    folder: str
    token: str


@dataclass(frozen=True)
class Member:
    """A client's reply to the roster query.

    Attributes
    ----------
    client, task : str
        Its id and its one task.
    examples : int
        Training examples that it declares, an upper bound of n_k.
    stage_trained : int
        Stage of the private state that it holds, 0 if none.
    lora_rank : int
        Rank of its Θ_l, 0 for the federation's.
    """

    client: str
    task: str
    examples: int
    stage_trained: int
    lora_rank: int = 0


@dataclass(frozen=True)
class ClientKeyProof:
    """A site's proof that it holds a client's key; see `pilot_flwr.flower.client_key`.

    Attributes
    ----------
    public_key : str
        In OpenSSH's format, without comment.
    signature : bytes
        Over the statement of this query, node and client.
    """

    public_key: str
    signature: bytes


@dataclass(frozen=True)
class Instruction:
    """What the server asks of one client in one exchange.

    Attributes
    ----------
    server_round : int
        Exchange, from 1.
    stage : int
        Architecture to train; this flag alone decides it.
    tasks : tuple of str
        All T tasks in the federation's order.
    adapters : dict
        Task → ψ_t: all T in stage 2, only the client's own in stage 1; empty states if task
        adapters are not shared.
    lora : State
        The shared tensors of this client's Θ̄_l.
    train, evaluate : bool
        Whether to train, and whether to evaluate the incoming model first.
    residual : State
        What exact aggregation has added to the frozen base of every client.
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
class TrainingResult:
    """Outcome of one local training.

    Attributes
    ----------
    losses : Losses
        All of `LOSSES`; empty if the client withholds its metrics.
    steps, examples : int
        Optimizer steps; examples in the data set (not multiplied by epochs).
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
    """Score on one client's test split.

    Attributes
    ----------
    score : float
        From 0 to the metric's maximum.
    metric : str
        A key of `pilot_flwr.metrics.METRICS`.
    examples : int
        Size of the split.
    seconds : float
        Wall time.
    approximate : bool
        Whether the score may differ from that of the metric's reference script.
    cut : int
        Answers truncated at `evaluation.max_new_tokens`.
    """

    score: float
    metric: str
    examples: int
    seconds: float
    approximate: bool = False
    cut: int = 0


@dataclass(frozen=True)
class Spent:
    """Privacy budget spent by a client, in one run or in all.

    Attributes
    ----------
    epsilon, delta : float
        (ε, δ) of the releases, including the one in progress.
    releases : int
        Their number.
    """

    epsilon: float
    delta: float
    releases: int


@dataclass(frozen=True)
class SessionResult:
    """Outcome of one session: evaluate the incoming model, then train it.

    Attributes
    ----------
    adapter, lora : State
        Uploaded tensors of Θ_a and Θ_l (`strategy.sharing`); no other parameter leaves the client.
    training : TrainingResult or None
        If the client trained.
    evaluation : EvaluationResult or None
        Of the incoming model, if it was evaluated.
    spent : Spent or None
        In this run, if the upload is clipped and noised.
    started : float
        Seconds since 1970.
    seconds : float
        Wall time of the session.
    """

    adapter: State = field(default_factory=dict)
    lora: State = field(default_factory=dict)
    training: TrainingResult | None = None
    evaluation: EvaluationResult | None = None
    spent: Spent | None = None
    started: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Update:
    """One client's contribution to an exchange.

    Attributes
    ----------
    client, task : str
        Sender.
    server_round : int
        Exchange.
    num_examples : int
        n_k.
    adapter, lora : State
        Θ_a and Θ_l.
    """

    client: str
    task: str
    server_round: int
    num_examples: int
    adapter: State
    lora: State
