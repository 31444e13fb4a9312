"""LLaVA with a wider hidden layer in its projector, for checkpoints that Pilot has merged.

transformers ties that width to ``text_config.hidden_size``. This file, part of the checkpoint's
folder, is the only difference from the model in transformers::

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

or, without remote code, ``from modeling_wide import WideLlava`` and
``WideLlava.from_pretrained(folder)``. The configuration's `projector_hidden_size` is the width.
"""

from typing import Any

from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration

CLASSES = {
    "LlavaForConditionalGeneration": "WideLlava",
    "LlavaOnevisionForConditionalGeneration": "WideLlavaOnevision",
}
"""Class in transformers, and its subclass here."""


def widen(projector: Any, hidden: int) -> None:
    """Give the projector new layers with a hidden layer of width `hidden`, in place."""
    first, second = projector.linear_1, projector.linear_2
    bias = first.bias is not None
    projector.linear_1 = nn.Linear(first.in_features, hidden, bias=bias)
    projector.linear_2 = nn.Linear(hidden, second.out_features, bias=bias)


class WideLlava(LlavaForConditionalGeneration):  # type: ignore[misc]
    """`LlavaForConditionalGeneration` with a projector of another width."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widen(self.model.multi_modal_projector, config.projector_hidden_size)


class WideLlavaOnevision(LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    """`LlavaOnevisionForConditionalGeneration` with a projector of another width."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widen(self.model.multi_modal_projector, config.projector_hidden_size)
