"""A base model's projector for tests."""

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


def projector(inputs, outputs, *, bias=True):
    """LLaVA's projector: two linear layers with a GELU between them."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=inputs, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=outputs, num_attention_heads=1),
        multimodal_projector_bias=bias,
    )
    return LlavaMultiModalProjector(config)
