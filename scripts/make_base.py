"""Make the demo's base model: a tiny LLaVA, pretrained on digit mosaics, as a Hugging Face folder.

    python scripts/make_base.py                        # rewrites pilot_flwr/assets/tiny-llava
    python scripts/make_base.py --out /tmp/base --seed 1

Two phases: plain pages until reading is learned, then mild random styles and auxiliary tasks.
Only pretraining scans are used, and counting is never asked for.
"""

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from base_model import make_model, make_processor
from base_tasks import (
    PLAIN_TASKS,
    STYLED_TASKS,
    Styles,
    Tasks,
    draw_example,
    like_a_client,
    mild,
    plain,
)
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pilot_flwr.data.collator import Collator
from pilot_flwr.data.demo import ask_caption, ask_count, ask_position, scan_indices
from pilot_flwr.data.examples import Example
from pilot_flwr.model.architectures import SPECS
from pilot_flwr.model.checkpoints import write_bundle
from pilot_flwr.model.processor import Processor

DEFAULT_OUT = Path(__file__).parents[1] / "pilot_flwr" / "assets" / "tiny-llava"
PLAIN_STEPS, STYLED_STEPS, BATCH_SIZE = 2000, 1100, 64
TAKEN_OFF = 0.15  # loss that ends the plain phase; its step varies, so none is fixed
LEARNING_RATE = 2e-3


def pixels(processor: LlavaProcessor, examples: list[Example]) -> torch.Tensor:
    """Pixel values, shape (B, 3, 32, 32)."""
    images = [example.images[0].read() for example in examples]
    values: torch.Tensor = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return values


@torch.no_grad()
def exact_match(
    model: LlavaForConditionalGeneration, collator: Collator, examples: list[Example]
) -> float:
    """Share of examples whose greedy generation equals the answer."""
    model.eval()
    hits = 0
    for start in range(0, len(examples), BATCH_SIZE):
        part = examples[start : start + BATCH_SIZE]
        batch = collator.prompt_batch(part)
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=pixels(collator.processor, part),
            max_new_tokens=16,
        )
        new = output[:, batch.input_ids.shape[1] :]
        replies = collator.tokenizer.batch_decode(new, skip_special_tokens=True)
        hits += sum(r.strip() == e.answers[0] for r, e in zip(replies, part, strict=True))
    return hits / len(examples)


def train(
    model: LlavaForConditionalGeneration,
    collator: Collator,
    *,
    tasks: Tasks,
    styles: Styles,
    steps: int,
    rng: np.random.Generator,
    until: float | None = None,
) -> list[float]:
    """Train all parameters for one phase; return the loss of each step.

    The learning rate falls to zero by a cosine over `steps`; with `until` it stays, and the phase
    ends as soon as the mean loss of 50 steps is below `until`.
    """
    pool = scan_indices("pretraining")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    warmup = 70

    def factor(step: int) -> float:
        decay = 1.0 if until is not None else 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / warmup) * decay

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: list[float] = []
    model.train()
    while len(losses) < steps:
        examples = [draw_example(tasks, styles, pool, rng) for _ in range(BATCH_SIZE)]
        batch = collator.train_batch(examples)
        loss = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            pixel_values=pixels(collator.processor, examples),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"step {len(losses)} of {steps}: loss {np.mean(losses[-50:]):.3f}", flush=True)
            if until is not None and np.mean(losses[-50:]) < until:
                break
    return losses


def held_out(
    model: LlavaForConditionalGeneration, collator: Collator, seed: int
) -> dict[str, float]:
    """Exact match on the validation scans, by style and task."""
    pool = scan_indices("validation")
    scores = {}
    for styles in (plain, mild, like_a_client):
        for writer in (ask_position, ask_caption, ask_count):
            rng = np.random.default_rng([seed, 2])
            cases = [draw_example({writer: 1.0}, styles, pool, rng) for _ in range(256)]
            name = f"{styles.__name__}/{writer.__name__}"
            scores[name] = round(exact_match(model, collator, cases), 4)
    return scores


def save_half(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Save in float16: half the size, and the same scores."""
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = "float16"
    model.half().save_pretrained(out)


def make_base(seed: int, plain_steps: int, styled_steps: int, out: Path) -> dict[str, Any]:
    """Train and write the folder; return what `training.json` records."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more threads only wait for each other at this size
    rng = np.random.default_rng([seed, 1])
    processor = make_processor(np.random.default_rng([seed, 0]))
    model = make_model(processor)
    collator = Collator(Processor(processor, SPECS["llava"]), max_length=128)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens", flush=True)
    first = {"tasks": PLAIN_TASKS, "styles": plain, "steps": plain_steps, "until": TAKEN_OFF}
    second = {"tasks": STYLED_TASKS, "styles": mild, "steps": styled_steps}
    phases = {
        name: train(model, collator, rng=rng, **phase)
        for name, phase in {"plain": first, "styled": second}.items()
    }
    record = {
        "seed": seed,
        "steps": {name: len(losses) for name, losses in phases.items()},
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "parameters": model.num_parameters(),
        "final_loss": {n: round(float(np.mean(x[-50:])), 4) for n, x in phases.items()},
        "validation_exact_match": held_out(model, collator, seed),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    save_half(model, out)
    processor.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    write_bundle(out)
    for path in out.iterdir():
        path.chmod(0o644)
    return record


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description="Make the demo's base model.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain-steps", type=int, default=PLAIN_STEPS)
    parser.add_argument("--styled-steps", type=int, default=STYLED_STEPS)
    args = parser.parse_args()
    record = make_base(args.seed, args.plain_steps, args.styled_steps, args.out)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
