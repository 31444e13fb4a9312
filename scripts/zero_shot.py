"""Score the demo's base model zero-shot on the federated test split.

    python scripts/zero_shot.py                # seed 0, nine clients, 60 test examples each
    python scripts/zero_shot.py --seed 1 --examples 200

Each client's own task in its own style; exact match of Hugging Face's greedy generation.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from make_base import DEFAULT_OUT, exact_match
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pilot_flwr.data.collator import Collator
from pilot_flwr.data.demo import TASKS, client_examples
from pilot_flwr.model.architectures import SPECS
from pilot_flwr.model.processor import Processor

CLIENTS_PER_TASK = 3


def main() -> None:
    """Print a row per task: its clients, and their mean."""
    parser = argparse.ArgumentParser(description="Measure the base model zero-shot.")
    parser.add_argument("--base", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(  # nosec B615  # a local folder
        args.base, dtype=torch.float32, use_safetensors=True
    )
    processor = AutoProcessor.from_pretrained(args.base)  # nosec B615  # a local folder
    collator = Collator(Processor(processor, SPECS["llava"]), max_length=128)
    means = []
    for number, task in enumerate(TASKS):
        scores = []
        for client_index in range(number * CLIENTS_PER_TASK, (number + 1) * CLIENTS_PER_TASK):
            examples = client_examples(
                task,
                client_index=client_index,
                num_clients=len(TASKS) * CLIENTS_PER_TASK,
                split="test",
                num_examples=args.examples,
                seed=args.seed,
            )
            scores.append(exact_match(model, collator, examples))
        means.append(float(np.mean(scores)))
        clients = "  ".join(f"{score:.3f}" for score in scores)
        print(f"{task:<12} {clients}   mean {means[-1]:.3f}", flush=True)
    print(f"all tasks    mean {np.mean(means):.3f}")


if __name__ == "__main__":
    main()
