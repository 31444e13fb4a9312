"""Θ_l, the text adapter: a LoRA in the frozen language model, by peft."""

from collections.abc import Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from pilot_flwr.errors import ModelError
from pilot_flwr.settings.model import LoraConfig


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
