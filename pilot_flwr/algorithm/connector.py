"""The connectors between vision tower and language model (docs/explanation/method.md, section 2).

`TaskClientConnector` is stage 1, `CrossTaskMoA` (CT-MoA) is stage 2. Both replace the projector,
which is the base model's own connector of any class, and every adapter is a copy of it. Shapes:
B images, N features of an image with D channels each, S visual tokens, C language-model channels,
T tasks.

H_v is the projector's input in the base model: (B, N, D), or the features of several images one
after the other, (N, D), with their numbers in `images`. Projectors that merge features into fewer
tokens keep their order, so outputs and routing decisions are per visual token.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pilot_flwr.algorithm.losses import difference_loss, load_balancing_loss, router_z_loss
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError

Merge = Callable[[Tensor], Tensor]
"""Maps H_v to the features that each visual token merges, (..., S, k D) for k features a token."""


class ConnectorOutput(NamedTuple):
    """x_img (..., S, C), and L_d, L_b and L_z without coefficients; zero if the stage has none."""

    features: Tensor
    difference: Tensor
    balance: Tensor
    z: Tensor


class Routing(NamedTuple):
    """P (..., S, T), and L_b and L_z without coefficients."""

    probs: Tensor
    balance: Tensor
    z: Tensor


def copied(projector: nn.Module, last: str = "") -> nn.Module:
    """Return an independent copy of a base model's projector.

    `last` names its last layer, or that layer's parameter, which is set to zero: the copy's output
    is zero until it is trained.
    """
    twin = copy.deepcopy(projector)
    if last:
        for name, parameter in twin.named_parameters():
            if f"{name}.".startswith(f"{last}."):
                nn.init.zeros_(parameter)
    return twin


def merge_features(features: Tensor, side: int, *, square: bool) -> Tensor:
    """Return the features that each visual token merges, side by side.

    Parameters
    ----------
    features : Tensor
        H_v, shape (..., N, D).
    side : int
        A token merges `side`² features; 1 if every feature is a token.
    square : bool
        Whether they are a `side` × `side` square of the image's square grid, whose features are in
        order of rows, or `side`² features that follow each other.

    Returns
    -------
    Tensor
        Shape (..., N / side², side² D), tokens in the projector's order.
    """
    if side == 1:
        return features
    *batch, count, channels = features.shape
    if square:
        edge = round(count**0.5) // side
        grid = features.reshape(*batch, edge, side, edge, side, channels)
        features = grid.transpose(-4, -3)
    return features.reshape(*batch, count // side**2, side**2 * channels)


def _tokens(adapter: nn.Module, features: Tensor) -> Tensor:
    """Return an adapter's tokens (..., S, C); some projectors give those of an image as a grid."""
    tokens: Tensor = adapter(features)
    return tokens.flatten(features.dim() - 2, -2)


def _images(tokens: Tensor, images: Sequence[int]) -> Iterator[Tensor]:
    """Yield the tokens of each image, (1, S, ·), or of all at once, (B, S, ·), if equally many."""
    if tokens.dim() == 3:
        yield tokens
        return
    merged = sum(images) // len(tokens)
    for image in torch.split(tokens, [count // merged for count in images]):
        yield image.unsqueeze(0)


class TaskClientConnector(nn.Module):
    """Stage 1: ``x_t = ψ_t(H_v)``, ``x_s = ψ_s(H_v)``, ``x_img = x_t + x_s``.

    Without ψ_s, the `client_adapter`, ``x_img = x_t`` and L_d = 0. `reduction` is that of L_d, see
    `pilot_flwr.algorithm.losses.difference_loss`.
    """

    def __init__(
        self,
        task_adapter: nn.Module,
        client_adapter: nn.Module | None,
        *,
        reduction: str = "normalized",
    ) -> None:
        super().__init__()
        self.task_adapter = task_adapter
        self.client_adapter = client_adapter
        self.reduction = reduction

    def forward(self, features: Tensor, images: Sequence[int] = ()) -> ConnectorOutput:
        """Map H_v to x_img (..., S, C) and L_d, the mean over images."""
        task = _tokens(self.task_adapter, features)
        zero = task.new_zeros(())
        if self.client_adapter is None:
            return ConnectorOutput(task, zero, zero, zero)
        client = _tokens(self.client_adapter, features)
        difference = zero
        if torch.is_grad_enabled():
            pairs = zip(_images(task, images), _images(client, images), strict=True)
            losses = [difference_loss(t, c, reduction=self.reduction) for t, c in pairs]
            difference = torch.stack(losses).mean()
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
    task_adapters : Mapping[str, Module]
        ψ_t of all T tasks; the first task is the client's own.
    cross_task_adapters : Mapping[str, Module] or None
        ψ_c of the T − 1 foreign tasks, in the same order; without them ``h_i = ψ_t^i(H_v)``.
    client_adapter : Module or None
        ψ_s, if there is one.
    router : Linear
        φ, without bias, from the features that a token merges to T.
    merge : callable, optional
        Maps H_v to the features that each token merges, as `merge_features` does; None if every
        feature is a token.
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
        task_adapters: Mapping[str, nn.Module],
        cross_task_adapters: Mapping[str, nn.Module] | None,
        client_adapter: nn.Module | None,
        router: nn.Linear,
        *,
        merge: Merge | None = None,
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
        self.merge = merge or (lambda features: features)
        self.use_client_adapter = use_client_adapter
        self.router_dtype = router_dtype
        self.reduction = reduction

    def forward(self, features: Tensor, images: Sequence[int] = ()) -> ConnectorOutput:
        """Map H_v to x_img (..., S, C), L_b and L_z."""
        probs, balance, z = self.route(features, images)
        client = self.client_adapter if self.use_client_adapter else None
        mixed = None if client is None else _tokens(client, features)
        for index, task in enumerate(self.tasks):
            expert = _tokens(self.task_adapters[task], features)
            if index > 0 and self.cross_task_adapters is not None:
                expert = expert + _tokens(self.cross_task_adapters[task], features)
            weight = probs[..., index, None].to(expert.dtype)
            mixed = weight * expert if mixed is None else torch.addcmul(mixed, weight, expert)
        assert mixed is not None
        return ConnectorOutput(mixed, mixed.new_zeros(()), balance, z)

    def route(self, features: Tensor, images: Sequence[int] = ()) -> Routing:
        """Map H_v to P (..., S, T), L_b and L_z."""
        logits = self.router_logits(features)
        wide = torch.promote_types(logits.dtype, torch.float32)
        probs = logits.softmax(-1, dtype=wide).to(logits.dtype)
        if self.reduction == "per_image":
            losses = [load_balancing_loss(p, reduction="per_image") for p in _images(probs, images)]
            balance = torch.stack(losses).mean()
        else:
            balance = load_balancing_loss(probs, reduction=self.reduction)
        return Routing(probs, balance, router_z_loss(logits))

    def router_logits(self, features: Tensor) -> Tensor:
        """Return g, shape (..., S, T), in `router_dtype`."""
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(self.router.weight.dtype, torch.float32)
            if self.router_dtype == "bfloat16":
                dtype = torch.bfloat16
            merged = self.merge(features)
            return nn.functional.linear(merged.to(dtype), self.router.weight.to(dtype))


def is_reserved(task: str) -> bool:
    """Whether torch reserves a task's name: modules have an attribute of this name."""
    return hasattr(nn.ModuleDict(), task)


def stage1_connector(
    projector: nn.Module, config: ModelConfig, *, last: str, reduction: str = "normalized"
) -> TaskClientConnector:
    """Build stage 1 from the base model's pretrained projector, copied to ψ_t.

    Parameters
    ----------
    projector : Module
        The pretrained projector.
    config : ModelConfig
        `initialisation` is ``identity`` (the last layer of ψ_s is zero, so training starts exactly
        at the base model) or ``official`` (ψ_s is the projector too); `client_adapter` says
        whether there is a ψ_s.
    last : str
        Name of the projector's last layer.
    reduction : str
        Of the difference loss.
    """
    inert = last if config.initialisation == "identity" else ""
    client = copied(projector, inert) if config.client_adapter else None
    return TaskClientConnector(copied(projector), client, reduction=reduction)


def stage2_connector(
    projector: nn.Module,
    config: ModelConfig,
    *,
    last: str,
    tasks: tuple[str, ...],
    client_adapter: nn.Module | None,
    channels: int,
    merge: Merge | None = None,
    generator: torch.Generator,
    reduction: str = "pooled",
) -> CrossTaskMoA:
    """Build stage 2: the client's ψ_s, new ψ_c and φ, and T task adapters to load into.

    Parameters
    ----------
    projector : Module
        The base model's pretrained projector.
    config : ModelConfig
        With `initialisation` ``identity`` every ψ_c ends in zero, with ``official`` it is the
        projector; `cross_task_adapters` says whether there are ψ_c, `stage2_client_adapter`
        whether ψ_s is added, `router_dtype` in which precision φ routes.
    last : str
        Name of the projector's last layer.
    tasks : tuple of str
        The client's own task first.
    client_adapter : Module or None
        ψ_s from stage 1.
    channels : int
        Channels of the features that a token merges: φ's inputs.
    merge : callable, optional
        See `CrossTaskMoA`.
    generator : torch.Generator
        Draws φ on the CPU, uniform in ±1/√channels as torch does.
    reduction : str
        Of the load-balancing loss.
    """
    router = nn.Linear(channels, len(tasks), bias=False)
    bound = channels**-0.5
    drawn = torch.empty(router.weight.shape, device="cpu")
    with torch.no_grad():
        router.weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
    inert = last if config.initialisation == "identity" else ""
    cross = {task: copied(projector, inert) for task in tasks[1:]}
    return CrossTaskMoA(
        {task: copied(projector) for task in tasks},
        cross if config.cross_task_adapters else None,
        client_adapter,
        router.to(next(projector.parameters())),
        merge=merge,
        use_client_adapter=config.stage2_client_adapter == "frozen",
        router_dtype=config.router_dtype,
        reduction=reduction,
    )
