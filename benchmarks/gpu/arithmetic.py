"""Floating point operations that a training step needs, counted by hand.

A multiplication with an addition is two operations. A frozen matrix costs 2 per parameter and
token forward and 2 backward (the gradient of its input alone), a trained one 2 more for its own
gradient; gradients of frozen parameters and of H_v cost nothing. Attention is counted as causal:
half of the square. Element-wise work counts as nothing.
"""

from typing import Any, NamedTuple

from pilot_flwr.model.memory import MicroBatch


class Operations(NamedTuple):
    """Operations of one training step on one micro-batch, by purpose."""

    frozen: int
    lora: int
    attention: int
    head: int
    connector: int
    difference: int
    embedding: int
    """Of the stand-in for the pixels; the tower's layers are skipped."""

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
    config: Any, batch: MicroBatch, *, rank: int, stage: int, tasks: int, causal: bool = True
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
    _, visual, channels = batch.features
    length = visual + batch.text_tokens
    tokens, rows = batch.examples * length, batch.examples * visual
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
        connector=_connector(rows, channels, width, stage=stage, tasks=tasks),
        embedding=_embedding(config.vision_config, batch.examples),
        difference=_difference(batch.examples, visual, width) if stage == 1 else 0,
    )


def _connector(rows: int, channels: int, width: int, *, stage: int, tasks: int) -> int:
    """Adapters D → C → C; the first layer's input, H_v, needs no gradient."""
    trained = 4 * channels * width + 6 * width * width
    frozen = 2 * channels * width + 2 * width * width
    if stage == 1:  # ψ_t, ψ_s
        return rows * 2 * trained
    # ψ_t and ψ_c; the foreign ψ_t and ψ_s; φ.
    return rows * (tasks * trained + tasks * frozen + 4 * channels * tasks)


def _embedding(vision: Any, examples: int) -> int:
    patches = (vision.image_size // vision.patch_size) ** 2
    inputs = vision.num_channels * vision.patch_size**2
    return 2 * examples * patches * inputs * vision.hidden_size


def _difference(examples: int, visual: int, width: int) -> int:
    """L_d by two Gram matrices, each with one product backward, or by x_tᵀ x_s with two."""
    if visual < width:
        return examples * 8 * visual * visual * width
    return examples * 6 * visual * width * width
