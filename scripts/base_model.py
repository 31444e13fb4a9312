"""The demo's base model before any training: its sizes, its tokenizer, its chat template.

To make a larger one, change the sizes in `make_model`.
"""

import numpy as np
import torch
from base_tasks import STYLED_TASKS
from base_tokenizer import CHAT_TEMPLATE, train_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from pilot_flwr.data.demo import ask_count

IMAGE_SIZE, PATCH_SIZE = 32, 8
NUM_VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_IDS = ("bos", "eos", "pad")


def make_processor(rng: np.random.Generator) -> LlavaProcessor:
    """Train the tokenizer on the demo's own texts and join it with the image processor."""
    labels = [rng.integers(0, 10, 4) for _ in range(200)]
    texts = [
        f"USER: {question} ASSISTANT: {answer}"
        for writer in [*STYLED_TASKS, ask_count]
        for digits in labels
        for question, answer in [writer(digits, rng)]
    ]
    tokenizer = train_tokenizer(texts, vocab_size=512, min_frequency=2)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Build the untrained model: D = 64 and three vision layers, C = 96 and four LLM layers."""
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_IDS}
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=NUM_VISUAL_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    # With CLIP's default of 0.02 a patch's content drowns its position: reading is learned late.
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    torch.nn.init.normal_(positions, std=0.3)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model
