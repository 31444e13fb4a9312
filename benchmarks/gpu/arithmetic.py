"""Floating point operations that a training step needs, counted by hand.

A multiplication with an addition is two operations. A frozen matrix costs 2 per parameter and
token forward and 2 backward (the gradient of its input alone), a trained one 2 more for its own
gradient; gradients of frozen parameters and of H_v cost nothing. Attention is counted as causal:
half of the square. Element-wise work counts as nothing.
"""

import math
from typing import Any, NamedTuple

from pilot_flwr.model.architectures import spec_of, token_channels
from pilot_flwr.model.memory import MicroBatch
from pilot_flwr.model.pilot_model import empty_base


class Operations(NamedTuple):
    """Operations of one training step on one micro-batch, by purpose."""

    frozen: int
    lora: int
    attention: int
    head: int
    connector: int
    difference: int

    @property
    def total(self) -> int:
        """Operations in all."""
        return sum(self)

    @property
    def recomputed(self) -> int:
        """Operations that gradient checkpointing adds: the decoder layers' second forward pass."""
        return self.frozen // 2 + self.lora // 3 + self.attention // 3


def linear_shapes(text: Any) -> list[tuple[int, int]]:
    """Return inputs and outputs of a decoder layer's q, k, v, o, gate, up and down."""
    width, inner = text.hidden_size, text.intermediate_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    query, key = text.num_attention_heads * head, text.num_key_value_heads * head
    attention = [(width, query), (width, key), (width, key), (query, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def operations(
    config: Any,
    batch: MicroBatch,
    *,
    rank: int,
    stage: int,
    tasks: int,
    causal: bool = True,
) -> Operations:
    """Count one step.

    Parameters
    ----------
    config
        The base's configuration, of transformers.
    batch : MicroBatch
        What is trained on.
    rank : int
        Of the LoRA, which is in all seven linear layers of every decoder layer.
    stage, tasks : int
        1 or 2; T.
    causal : bool
        Whether attention looks back only; else the whole square is counted.
    """
    text = config.text_config
    images, visual = _visual_tokens(config, batch)
    length = batch.image_tokens + batch.text_tokens
    tokens, rows = batch.examples * length, images * visual
    shapes = linear_shapes(text)
    layers = text.num_hidden_layers
    pairs = length * (length + 1) // 2 if causal else length * length
    width = text.hidden_size
    return Operations(
        frozen=4 * tokens * layers * sum(i * o for i, o in shapes),
        lora=6 * tokens * layers * sum(rank * (i + o) for i, o in shapes),
        # Two products forward, four backward, each over the query's width.
        attention=12 * batch.examples * layers * pairs * shapes[0][1],
        head=4 * batch.examples * batch.answer_tokens * width * text.vocab_size,
        connector=rows * _connector(config, stage=stage, tasks=tasks),
        difference=_difference(images, visual, width) if stage == 1 else 0,
    )


def _visual_tokens(config: Any, batch: MicroBatch) -> tuple[int, int]:
    """Return how many images the tower sees, crops or packed ones, and the tokens of each."""
    *rows, features, _ = batch.features
    side = spec_of(config).side(config)
    return batch.examples * math.prod(rows), features // side**2


def _connector(config: Any, *, stage: int, tasks: int) -> int:
    """Return the operations of adapters and router for one token.

    The first matrix's input needs no gradient if it is H_v, and not the output of a trained norm.
    """
    adapter = empty_base(config).model.get_submodule(spec_of(config).projector)
    matrices = [parameter.numel() for parameter in adapter.parameters() if parameter.ndim == 2]
    normed = any("Norm" in type(module).__name__ for module in adapter.modules())
    trained = 6 * sum(matrices) - (0 if normed else 2 * matrices[0])
    if stage == 1:  # ψ_t, ψ_s
        return int(2 * trained)
    # ψ_t and ψ_c; the foreign ψ_t and ψ_s; φ.
    return int(tasks * (trained + 2 * sum(matrices) + 4 * token_channels(config)))


def _difference(images: int, visual: int, width: int) -> int:
    """L_d by two Gram matrices, each with one product backward, or by x_tᵀ x_s with two."""
    if visual < width:
        return images * 8 * visual * visual * width
    return images * 6 * visual * width * width
