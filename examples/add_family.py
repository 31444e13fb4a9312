"""A family of base models that the package lacks, from one row to a federated run.

Aya Vision is a SigLIP tower, a projector and a Cohere decoder. The projector merges squares of
2 × 2 features into one token, then has a LayerNorm and two linear layers with a gate between them.
`ROW` says where it is; transformers' own forward pass does the rest.

Run ``python examples/add_family.py``: it writes a small random checkpoint, compares the logits of
a model whose adapters are inert with those of the untouched model, and trains two clients, all in
seconds. To keep a family, see docs/how-to/add-base-model.md.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from pilot_flwr.config.model import FeatureCacheConfig, ModelConfig
from pilot_flwr.data.collator import IGNORE_INDEX, Collator
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.launch.in_process import run_in_process
from pilot_flwr.model.architectures import SPECS, ModelSpec
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import load_base, load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel

ROW = ModelSpec(
    projector="multi_modal_projector",  # where the projector is in transformers' AyaVisionModel
    last="linear_2",  # its last layer: zero in new ψ_s and ψ_c
    tower="vision_tower",
    side=lambda config: int(config.downsample_factor),  # 2 × 2 features become a token
    square=True,  # of a grid, row by row
)
"""The family, as a row of `SPECS`."""

TEMPLATE = (
    "<BOS_TOKEN>{% for message in messages %}<|START_OF_TURN_TOKEN|><|{{ message['role'] }}|>"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|assistant|>{% endif %}"
)
"""A chat template like Aya's."""

SPECIAL = (
    *("<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<image>", "TILE", "TILE_GLOBAL"),
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
)
SMALL = (
    "data.tasks=[vqa,counting] data.clients_per_task=1 data.train_examples=4 data.test_examples=2 "
    "train.epochs=1 train.batch_size=2 strategy.rounds=1 model.lora.rank=2 "
    "evaluation.max_new_tokens=2 run.report=false run.tensorboard=false"
)


def write_checkpoint(folder: Path) -> str:
    """Write a small random Aya Vision in transformers' format; return its path."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
        extra_special_tokens=list(SPECIAL),
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision = {"image_size": 56, "patch_size": 14, "num_attention_heads": 2}
    ids = {n: tokenizer.convert_tokens_to_ids(f"<{n}>") for n in ("PAD", "BOS_TOKEN")}
    config = transformers.AyaVisionConfig(
        text_config=transformers.Cohere2Config(
            **sizes,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            pad_token_id=ids["PAD"],
            bos_token_id=ids["BOS_TOKEN"],
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=transformers.SiglipVisionConfig(**sizes, **vision, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = transformers.GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=4)
    images.save_pretrained(folder)
    values = {"processor_class": "AyaVisionProcessor", "patch_size": 14, "img_size": 56}
    (folder / "processor_config.json").write_text(json.dumps(values | {"downsample_factor": 2}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def examples() -> list[Example]:
    """Return conversations with one image, with two of odd sizes, and with none."""
    made = []
    for sizes in ([(56, 56)], [(30, 90), (100, 40)], []):
        images = tuple(KeptImage(Image.effect_noise(s, 90).convert("RGB")) for s in sizes)
        question = "<image>\n" * len(images) + "What is it?"
        turns = (Turn("user", question), Turn("assistant", "two zebras"))
        made.append(Example(f"{len(made)}", images, turns))
    return made


@torch.no_grad()
def differences(path: str, given: Sequence[Example]) -> dict[int, float]:
    """Return the largest difference from the untouched model's logits, by stage."""
    config = ModelConfig(path=path)
    processor = load_processor(path)
    collator = make_collator(config, processor, max_length=2048)
    untouched, base = (load_base(config, torch.device("cpu")).eval() for _ in range(2))
    model = PilotModel(base, config).eval()
    model.enter_stage1("vqa")
    visual = FeatureCache(FeatureCacheConfig(where="off")).encode(model, processor, given)
    batch, found = collator.train_batch(given), {}
    expected = [_answers(untouched, processor.original, collator, one) for one in given]
    for stage in (1, 2):
        if stage == 2:
            model.enter_stage2(("vqa", "counting"), torch.Generator().manual_seed(0))
        logits = model(batch, visual).logits
        found[stage] = float((logits - torch.cat(expected)).abs().max())
    return found


def _answers(untouched: Any, processor: Any, collator: Collator, one: Example) -> Tensor:
    """Return the untouched model's logits at an example's answer, by transformers alone."""
    ids, labels = collator.tokenize(one)
    content = [{"type": "image"} for _ in one.images] + [{"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "two zebras"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        tokenize=False,
    )
    images = {"images": [[image.read() for image in one.images]]} if one.images else {}
    inputs = processor(text=[text], add_special_tokens=False, return_tensors="pt", **images)
    assert inputs["input_ids"][0].tolist() == ids
    counted = torch.tensor(labels)[1:] != IGNORE_INDEX
    return untouched(**inputs).logits[0, :-1][counted]


def main(folder: Path) -> dict[int, float]:
    """Add the family, compare its logits, and run a federation; return the differences."""
    with patch.dict(SPECS, aya_vision=ROW):
        path = write_checkpoint(folder / "base")
        found = differences(path, examples())
        for stage, difference in found.items():
            print(f"stage {stage}: logits differ by at most {difference:.1e} from the base model's")
        overrides = f"{SMALL} model.path={path} run.folder={folder / 'run'}"
        outcome = run_in_process(overrides, folder / "run", out=print)
    if not outcome.succeeded:
        raise SystemExit("\n".join(outcome.explanation))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.mkdtemp()))
