"""Θ_l, the text adapter: a LoRA in the frozen language model, by peft."""

from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pilot_flwr.errors import ModelError
from pilot_flwr.settings.model import LoraConfig

RESIDUAL = "residual"
"""peft's name of the second LoRA; Θ_l's is ``default``."""


def add_lora(language_model: nn.Module, lora: LoraConfig, *, dtype: torch.dtype) -> None:
    """Put Θ_l into the language model, in place, by peft.

    Raises
    ------
    ModelError
        No linear layer is called as one of `model.lora.targets`; peft would pass over it.
    """
    linear = [f".{name}" for name, m in language_model.named_modules() if isinstance(m, nn.Linear)]
    if unknown := [t for t in lora.targets if not any(n.endswith(f".{t}") for n in linear)]:
        there = sorted({name.rpartition(".")[2] for name in linear})
        raise ModelError(
            f"`model.lora.targets` names {unknown} but must name linear layers, of {there}."
        )
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
    """Add what exact aggregation has left over to the frozen weights, in place of what was there.

    It is a second LoRA of peft beside Θ_l in the layers that it has tensors for, frozen, of the
    same scale and without dropout, in float32.

    Parameters
    ----------
    language_model : Module
        With Θ_l in it.
    residual : Mapping[str, Tensor]
        ``<layer>.lora_A`` and ``<layer>.lora_B``; nothing takes out what was there.

    Raises
    ------
    ModelError
        A factor is no matrix, or of rank 0.
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


def lora_layers(model: nn.Module) -> list[Any]:
    """Return peft's layers in `model`."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def share_inputs(layers: Sequence[Any], shared: bool) -> None:
    """Let peft take inputs as they are, which it otherwise casts to the LoRA's own type.

    Under autocast the cast changes no value, but each of a layer's LoRAs would keep a copy of
    its own for the backward pass. It stays as set, because checkpointing runs layers again in
    the backward pass.
    """
    for layer in layers:
        layer.cast_input_dtype_enabled = not shared
