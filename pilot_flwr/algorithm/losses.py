"""The auxiliary losses of Pilot (docs/explanation/method.md, section 2) and FedDAT, all pure.

Coefficients are not applied here: `pilot_flwr.client.training` does that, once.
"""

import torch
from torch import Tensor
from torch.nn import functional

_EPSILON = 1e-12


def difference_loss(task_features: Tensor, client_features: Tensor, *, reduction: str) -> Tensor:
    """Keep task and client features apart: ``L_d = ‖x_tᵀ x_s‖²_F``.

    Parameters
    ----------
    task_features, client_features : Tensor
        x_t and x_s, shape (B, N, C): images, visual tokens, channels.
    reduction : {"normalized", "frobenius", "official"}
        ``frobenius``: the paper's formula, mean over images. ``normalized``: the same with x_t and
        x_s of each image scaled to unit Frobenius norm; in [0, 1] for any N and C. ``official``:
        the official code's mean over all (N·C)² entries of the product of the flattened batch,
        each image scaled to unit norm, the norm detached.

    Returns
    -------
    Tensor
        Scalar, in float32 or better.

    Raises
    ------
    ValueError
        Shapes differ or are not three-dimensional, or the reduction is unknown.

    Notes
    -----
    ``‖AᵀB‖²_F = ⟨AAᵀ, BBᵀ⟩_F``: an N×N (``official``: B×B) matrix replaces the C×C
    ((N·C)×(N·C)) one where it is smaller. Source: paper, eq. of L_d.
    """
    if task_features.shape != client_features.shape or task_features.dim() != 3:
        raise ValueError(
            f"Features must share one shape (B, N, C), got {tuple(task_features.shape)} "
            f"and {tuple(client_features.shape)}."
        )
    with torch.autocast(task_features.device.type, enabled=False):
        task, client = _at_least_float32(task_features), _at_least_float32(client_features)
        if reduction == "normalized":
            energy, norms = _cross_energy(task, client)
            return (energy / (norms + _EPSILON)).mean()
        if reduction == "frobenius":
            return _cross_energy(task, client)[0].mean()
        if reduction == "official":
            return _official_difference(task.flatten(1), client.flatten(1))
    raise ValueError(f"Unknown reduction {reduction!r}.")


def load_balancing_loss(router_probs: Tensor, *, reduction: str = "pooled") -> Tensor:
    """Spread the tokens over the experts: ``L_b = T · Σ_i f_i · P̄_i``.

    Parameters
    ----------
    router_probs : Tensor
        P, shape (..., N, T): every token's distribution over the T experts.
    reduction : {"pooled", "per_image"}
        ``pooled``: f and P̄ are means over all tokens. ``per_image``: they are means over the N
        tokens of one image, and L_b is the mean over images, as in the official code: each image
        has to be spread over the experts, even if the images together are.

    Returns
    -------
    Tensor
        Scalar: 1 for an even split, T for a collapse. f_i, the share of tokens whose most probable
        expert is i, carries no gradient; the mean probability P̄_i does. Source: paper, eq. of L_b
        (as in Switch Transformer).

    Raises
    ------
    ValueError
        The reduction is unknown.
    """
    num_experts = router_probs.shape[-1]
    if reduction == "pooled":
        probs = router_probs.reshape(-1, num_experts)
    elif reduction == "per_image":
        probs = router_probs
    else:
        raise ValueError(f"Unknown reduction {reduction!r}.")
    choice = torch.nn.functional.one_hot(probs.argmax(-1), num_experts)
    share = _at_least_float32(choice.to(probs.dtype)).mean(-2)
    mean = probs.mean(-2).to(share.dtype)
    return num_experts * torch.einsum("...t,...t->...", share, mean).mean()


def router_z_loss(router_logits: Tensor) -> Tensor:
    """Keep the router's logits small: ``L_z = mean over tokens of (logsumexp g)²``.

    Parameters
    ----------
    router_logits : Tensor
        g, shape (..., T).

    Returns
    -------
    Tensor
        Scalar. Source: paper, eq. of L_z (as in ST-MoE).
    """
    return router_logits.logsumexp(-1).square().mean()


def distillation_loss(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Return the divergence from another model's probabilities, ``T² Σ_m KL(q_m ‖ p_m)``.

    Parameters
    ----------
    logits, targets : Tensor
        Of the model that learns and of the other one, shape (M, V): answer tokens, vocabulary.
        p = softmax(logits / T), q = softmax(targets / T); q is constant.
    temperature : float
        T.

    Returns
    -------
    Tensor
        Scalar, summed over the tokens, in float32.

    Notes
    -----
    Source: FedDAT (Chen et al., AAAI 2024, arXiv 2308.12305). T² keeps the gradient's size.
    """
    learned = functional.log_softmax(logits.float() / temperature, dim=-1)
    other = functional.log_softmax(targets.detach().float() / temperature, dim=-1)
    divergence = functional.kl_div(learned, other, reduction="sum", log_target=True)
    return temperature**2 * divergence


def _at_least_float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _cross_energy(task: Tensor, client: Tensor) -> tuple[Tensor, Tensor]:
    """``‖x_tᵀ x_s‖²_F`` and ``‖x_t‖²_F ‖x_s‖²_F`` of every image, each of shape (B,)."""
    tokens, channels = task.shape[1:]
    if tokens >= channels:
        norms = task.square().sum((1, 2)) * client.square().sum((1, 2))
        return torch.einsum("bnc,bnd->bcd", task, client).square().sum((1, 2)), norms
    task_gram, client_gram = gram(task), gram(client)
    norms = torch.einsum("bnn->b", task_gram) * torch.einsum("bnn->b", client_gram)
    return torch.einsum("bnm,bnm->b", task_gram, client_gram), norms


def _official_difference(task: Tensor, client: Tensor) -> Tensor:
    task = task / (task.norm(dim=1, keepdim=True).detach() + 1e-6)
    client = client / (client.norm(dim=1, keepdim=True).detach() + 1e-6)
    entries = task.shape[1]
    energy, _ = _cross_energy(task.unsqueeze(0), client.unsqueeze(0))
    return energy.squeeze(0) / entries**2


def gram(features: Tensor) -> Tensor:
    """Return ``XXᵀ`` of every image: (B, N, N) from (B, N, C)."""
    product: Tensor = _Gram.apply(features)  # type: ignore[no-untyped-call]
    return product


class _Gram(torch.autograd.Function):
    """``XXᵀ`` per image. Its gradient, (G + Gᵀ) X, is one product where autograd takes two."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, features: Tensor) -> Tensor:
        """Return (B, N, N) from (B, N, C)."""
        ctx.save_for_backward(features)
        return torch.einsum("bnc,bmc->bnm", features, features)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        """Return the gradient, (B, N, C)."""
        (features,) = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,) = grads
        return torch.einsum("bnm,bmc->bnc", grad + grad.mT, features)
