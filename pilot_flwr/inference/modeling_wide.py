"""LLaVA with a wider hidden layer in its projector, for checkpoints that Pilot has merged.

transformers ties that width to ``text_config.hidden_size``; here it is `projector_hidden_size`.
This file is part of the checkpoint::

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

or, without remote code, ``from modeling_wide import WideLlava`` and
``WideLlava.from_pretrained(folder)``.
"""

from typing import Any

from torch import nn
from transformers import (
    FastVlmForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

CLASSES = {
    "FastVlmForConditionalGeneration": "WideFastVlm",
    "LlavaForConditionalGeneration": "WideLlava",
    "LlavaNextForConditionalGeneration": "WideLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "WideLlavaOnevision",
}
"""Class in transformers, and its subclass here."""


def widen(projector: Any, hidden: int) -> None:
    """Replace the projector's layers by new ones with a hidden layer of width `hidden`."""
    first, second = projector.linear_1, projector.linear_2
    bias = first.bias is not None
    projector.linear_1 = nn.Linear(first.in_features, hidden, bias=bias)
    projector.linear_2 = nn.Linear(hidden, second.out_features, bias=bias)


class WideFastVlm(FastVlmForConditionalGeneration):  # type: ignore[misc]
    """`FastVlmForConditionalGeneration` with a projector of another width."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widen(self.model.multi_modal_projector, config.projector_hidden_size)


class WideLlava(LlavaForConditionalGeneration):  # type: ignore[misc]
    """`LlavaForConditionalGeneration` with a projector of another width."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widen(self.model.multi_modal_projector, config.projector_hidden_size)


class WideLlavaNext(LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """`LlavaNextForConditionalGeneration` with a projector of another width."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widen(self.model.multi_modal_projector, config.projector_hidden_size)


class WideLlavaOnevision(LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    """`LlavaOnevisionForConditionalGeneration` with a projector of another width."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widen(self.model.multi_modal_projector, config.projector_hidden_size)
