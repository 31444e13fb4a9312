"""Add peft's LoRA, the text adapter Θ_l, to a language model, and a residual beside it."""

from collections.abc import Iterable, Mapping

import peft
from peft.tuners.lora import LoraLayer
from torch import Tensor, dtype, nn

from pilot_flwr.config.model import LoraConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import check_targets

RESIDUAL = "residual"
"""peft's name of the second LoRA; Θ_l's is ``default``."""


def add_lora(language_model: nn.Module, lora: LoraConfig, *, dtype: dtype) -> None:
    """Add Θ_l to the language model in place; raise `ModelError` if a target is not linear."""
    linear = [name for name, m in language_model.named_modules() if isinstance(m, nn.Linear)]
    check_targets(linear, lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    peft.inject_adapter_in_model(config, language_model)
    for name, parameter in language_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def set_residual(language_model: nn.Module, residual: Mapping[str, Tensor]) -> None:
    """Put a frozen LoRA beside Θ_l, in place of the previous one.

    Every layer with a ``<layer>.lora_A`` and ``<layer>.lora_B`` in `residual` gets a second,
    frozen LoRA of peft: same scale, no dropout, float32.
    """
    trainable = {name for name, p in language_model.named_parameters() if p.requires_grad}
    for name, layer in language_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if RESIDUAL in layer.lora_A:
            layer.delete_adapter(RESIDUAL)
        factor = residual.get(f"{name}.lora_A")
        if factor is None:
            continue
        if factor.ndim != 2 or not len(factor):
            raise ModelError(f"The residual of `{name}` has factors of shape {list(factor.shape)}.")
        config = peft.LoraConfig(r=len(factor), lora_dropout=0.0, init_lora_weights=False)
        layer.update_layer(RESIDUAL, len(factor), config.lora_alpha, config)
        layer.scaling[RESIDUAL] = layer.scaling["default"]
        layer.set_adapter(["default", RESIDUAL])
    for name, parameter in language_model.named_parameters():
        if f".{RESIDUAL}." in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(name in trainable and f".{RESIDUAL}." not in name)


def scale_loras(
    layers: Iterable[LoraLayer], lora: LoraConfig, own: float | Tensor, beside: float | Tensor
) -> None:
    """Multiply the outputs of Θ_l and of the frozen LoRA beside it, at their scale α / r."""
    for layer in layers:
        for name, factor in (("default", own), (RESIDUAL, beside)):
            if name in layer.lora_A:
                scale = factor * (lora.alpha / lora.rank)
                if isinstance(scale, Tensor):  # layers may be on several devices
                    scale = scale.to(layer.lora_A[name].weight.device)
                layer.scaling[name] = scale
