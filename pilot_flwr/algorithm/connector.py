"""The connectors between vision tower and language model (docs/explanation/method.md, section 2).

`TaskClientConnector` is stage 1, `CrossTaskMoA` (CT-MoA) is stage 2. Both replace a LLaVA model's
projector and are built from `Adapter`s of the projector's shape. Shapes: B images, N visual tokens,
D vision channels, C language-model channels, T tasks.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pilot_flwr.algorithm.losses import difference_loss, load_balancing_loss, router_z_loss
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError


class ConnectorOutput(NamedTuple):
    """x_img (B, N, C), and L_d, L_b and L_z without coefficients; zero if the stage has none."""

    features: Tensor
    difference: Tensor
    balance: Tensor
    z: Tensor


class Routing(NamedTuple):
    """P (B, N, T), and L_b and L_z without coefficients."""

    probs: Tensor
    balance: Tensor
    z: Tensor


class Adapter(nn.Module):
    """Two-layer GELU MLP D → C → C: ψ_t, ψ_s and ψ_c, named as in transformers' projector."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features, bias=bias)
        self.linear_2 = nn.Linear(out_features, out_features, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., D) to (..., C)."""
        hidden: Tensor = nn.functional.gelu(self.linear_1(features))
        output: Tensor = self.linear_2(hidden)
        return output

    def copy(self, *, zero_output: bool = False) -> "Adapter":
        """Return an independent copy; with `zero_output` its last layer is zero."""
        twin = deepcopy(self)  # constructing one would draw its weights first: three times slower
        if zero_output:
            with torch.no_grad():
                for parameter in twin.linear_2.parameters():
                    parameter.zero_()
        return twin


class TaskClientConnector(nn.Module):
    """Stage 1: ``x_t = ψ_t(H_v)``, ``x_s = ψ_s(H_v)``, ``x_img = x_t + x_s``.

    Without ψ_s, the `client_adapter`, ``x_img = x_t`` and L_d = 0. `reduction` is that of L_d, see
    `pilot_flwr.algorithm.losses.difference_loss`.
    """

    def __init__(
        self,
        task_adapter: Adapter,
        client_adapter: Adapter | None,
        *,
        reduction: str = "normalized",
    ) -> None:
        super().__init__()
        self.task_adapter = task_adapter
        self.client_adapter = client_adapter
        self.reduction = reduction

    def forward(self, features: Tensor) -> ConnectorOutput:
        """Map H_v (B, N, D) to x_img (B, N, C) and L_d."""
        task = self.task_adapter(features)
        zero = task.new_zeros(())
        if self.client_adapter is None:
            return ConnectorOutput(task, zero, zero, zero)
        client = self.client_adapter(features)
        difference = zero
        if torch.is_grad_enabled():
            difference = difference_loss(task, client, reduction=self.reduction)
        return ConnectorOutput(task + client, difference, zero, zero)


class CrossTaskMoA(nn.Module):
    """Stage 2, the cross-task mixture of adapters, dense over all T experts.

    ::

        h_1   = ψ_t^1(H_v)                    the client's own task
        h_i   = ψ_t^i(H_v) + ψ_c^i(H_v)       i ≥ 2, a foreign task
        g     = H_v W_φ,  P = softmax(g)      per visual token
        x_img = ψ_s(H_v) + Σ_i P[:, i] ⊙ h_i

    Parameters
    ----------
    task_adapters : Mapping[str, Adapter]
        ψ_t of all T tasks; the first task is the client's own.
    cross_task_adapters : Mapping[str, Adapter] or None
        ψ_c of the T − 1 foreign tasks, in the same order; without them ``h_i = ψ_t^i(H_v)``.
    client_adapter : Adapter or None
        ψ_s, if there is one.
    router : Linear
        φ, D → T, without bias.
    use_client_adapter : bool
        Whether ψ_s is added; the official code leaves it out.
    router_dtype : {"float32", "bfloat16"}
        Precision of g, P and L_z; L_b is at least float32. With ``float32``, float64 parameters
        stay float64.
    reduction : str
        Of L_b, see `pilot_flwr.algorithm.losses.load_balancing_loss`.

    Raises
    ------
    ModelError
        The tasks or the router's size do not match, or a task's name is reserved.
    """

    def __init__(
        self,
        task_adapters: Mapping[str, Adapter],
        cross_task_adapters: Mapping[str, Adapter] | None,
        client_adapter: Adapter | None,
        router: nn.Linear,
        *,
        use_client_adapter: bool = True,
        router_dtype: str = "float32",
        reduction: str = "pooled",
    ) -> None:
        super().__init__()
        self.tasks = tuple(task_adapters)
        if cross_task_adapters is not None and tuple(cross_task_adapters) != self.tasks[1:]:
            raise ModelError(
                f"Cross-task adapters are for {list(cross_task_adapters)} but must be for the "
                f"foreign tasks {list(self.tasks[1:])}."
            )
        for task in self.tasks:
            if is_reserved(task):
                raise ModelError(f"Task name {task!r} is reserved by torch; choose another.")
        if router.out_features != len(self.tasks):
            raise ModelError(
                f"The router has {router.out_features} outputs but there are "
                f"{len(self.tasks)} tasks."
            )
        self.task_adapters = nn.ModuleDict(dict(task_adapters))
        self.cross_task_adapters = (
            None if cross_task_adapters is None else nn.ModuleDict(dict(cross_task_adapters))
        )
        self.client_adapter = client_adapter
        self.router = router
        self.use_client_adapter = use_client_adapter
        self.router_dtype = router_dtype
        self.reduction = reduction

    def forward(self, features: Tensor) -> ConnectorOutput:
        """Map H_v (B, N, D) to x_img (B, N, C), L_b and L_z."""
        probs, balance, z = self.route(features)
        client = self.client_adapter if self.use_client_adapter else None
        mixed = None if client is None else client(features)
        for index, task in enumerate(self.tasks):
            expert = self.task_adapters[task](features)
            if index > 0 and self.cross_task_adapters is not None:
                expert = expert + self.cross_task_adapters[task](features)
            weight = probs[..., index, None].to(expert.dtype)
            mixed = weight * expert if mixed is None else torch.addcmul(mixed, weight, expert)
        assert mixed is not None
        return ConnectorOutput(mixed, mixed.new_zeros(()), balance, z)

    def route(self, features: Tensor) -> Routing:
        """Map H_v (B, N, D) to P, L_b and L_z."""
        logits = self.router_logits(features)
        wide = torch.promote_types(logits.dtype, torch.float32)
        probs = logits.softmax(-1, dtype=wide).to(logits.dtype)
        balance = load_balancing_loss(probs, reduction=self.reduction)
        return Routing(probs, balance, router_z_loss(logits))

    def router_logits(self, features: Tensor) -> Tensor:
        """Return g, shape (B, N, T), in `router_dtype`."""
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(self.router.weight.dtype, torch.float32)
            if self.router_dtype == "bfloat16":
                dtype = torch.bfloat16
            return nn.functional.linear(features.to(dtype), self.router.weight.to(dtype))


def is_reserved(task: str) -> bool:
    """Whether torch reserves a task's name: modules have an attribute of this name."""
    return hasattr(nn.ModuleDict(), task)


def stage1_connector(
    projector: Adapter, config: ModelConfig, *, reduction: str = "normalized"
) -> TaskClientConnector:
    """Build stage 1 from the base model's pretrained projector, copied to ψ_t.

    Parameters
    ----------
    projector : Adapter
        The pretrained projector.
    config : ModelConfig
        `initialisation` is ``identity`` (the last layer of ψ_s is zero, so training starts exactly
        at the base model) or ``official`` (ψ_s is the projector too); `client_adapter` says
        whether there is a ψ_s.
    reduction : str
        Of the difference loss.
    """
    identity = config.initialisation == "identity"
    client = projector.copy(zero_output=identity) if config.client_adapter else None
    return TaskClientConnector(projector.copy(), client, reduction=reduction)


def stage2_connector(
    projector: Adapter,
    config: ModelConfig,
    *,
    tasks: tuple[str, ...],
    client_adapter: Adapter | None,
    generator: torch.Generator,
    reduction: str = "pooled",
) -> CrossTaskMoA:
    """Build stage 2: the client's ψ_s, new ψ_c and φ, and T task adapters to load into.

    Parameters
    ----------
    projector : Adapter
        The base model's pretrained projector.
    config : ModelConfig
        With `initialisation` ``identity`` every ψ_c ends in zero, with ``official`` it is the
        projector; `cross_task_adapters` says whether there are ψ_c, `stage2_client_adapter`
        whether ψ_s is added, `router_dtype` in which precision φ routes.
    tasks : tuple of str
        The client's own task first.
    client_adapter : Adapter or None
        ψ_s from stage 1.
    generator : torch.Generator
        Draws φ on the CPU, uniform in ±1/√D as torch does.
    reduction : str
        Of the load-balancing loss.
    """
    weight = projector.linear_1.weight
    router = nn.Linear(weight.shape[1], len(tasks), bias=False)
    bound = weight.shape[1] ** -0.5
    drawn = torch.empty(router.weight.shape, device="cpu")
    with torch.no_grad():
        router.weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
    identity = config.initialisation == "identity"
    cross = {task: projector.copy(zero_output=identity) for task in tasks[1:]}
    return CrossTaskMoA(
        {task: projector.copy() for task in tasks},
        cross if config.cross_task_adapters else None,
        client_adapter,
        router.to(weight),
        use_client_adapter=config.stage2_client_adapter == "frozen",
        router_dtype=config.router_dtype,
        reduction=reduction,
    )
