"""Record the plan of each base model: parameters counted and memory estimated from shapes.

Nothing is measured: the figures are those of ``pilot-flwr plan``, kept so that the documentation's
table comes from a file. Run ``python benchmarks/plan.py`` (about a minute) to update
``benchmarks/results/plan.json``, or ``--quick`` for a smoke test.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from _record import RESULTS, write_record

from pilot_flwr.config.loading import load_config
from pilot_flwr.model.resource_plan import make_plan

RESULT = RESULTS / "plan.json"
PAPER = "experiment=paper"
CASES = {
    "LLaVA-1.5-7B, the paper's scenario": PAPER,
    "the same, without checkpointing": f"{PAPER} model.gradient_checkpointing=false",
    "the same, 4-bit base, with checkpointing": f"{PAPER} model.quantization=4bit",
    "LLaVA-1.5-13B": f"{PAPER} model=llava-1.5-13b",
    "LLaVA-Interleave-0.5B": f"{PAPER} model=llava-interleave-0.5b",
    "LLaVA-1.6-Mistral-7B": f"{PAPER} model=llava-1.6-mistral-7b train.max_length=8192",
    "LLaVA-OneVision-0.5B": f"{PAPER} model=llava-onevision-0.5b train.max_length=8192",
    "LLaVA-OneVision-7B": f"{PAPER} model=llava-onevision-7b train.max_length=8192",
    "Qwen2.5-VL-3B": f"{PAPER} model=qwen2.5-vl-3b",
    "Qwen2.5-VL-7B": f"{PAPER} model=qwen2.5-vl-7b",
    "Qwen3-VL-4B": f"{PAPER} model=qwen3-vl-4b",
    "Qwen3-VL-8B": f"{PAPER} model=qwen3-vl-8b",
    "InternVL3-2B": f"{PAPER} model=internvl3-2b train.max_length=8192",
    "InternVL3-8B": f"{PAPER} model=internvl3-8b train.max_length=8192",
    "Gemma-3-4B": f"{PAPER} model=gemma-3-4b",
    "Gemma-3-12B": f"{PAPER} model=gemma-3-12b",
    "SmolVLM2-0.5B": f"{PAPER} model=smolvlm2-0.5b",
    "SmolVLM2-2.2B": f"{PAPER} model=smolvlm2-2.2b",
}
"""Overrides by title; rank, tasks and clients are always the paper's."""

GPU_GIB = (24, 80)


def figures(overrides: str) -> dict[str, Any]:
    """Return one plan's figures: parameter counts, and memory in bytes."""
    plan = make_plan(load_config(overrides))
    memory = [stage.memory for stage in plan.stages.values()]
    batch = plan.batch
    return {
        "overrides": overrides,
        "lora": plan.stages[1].parameters["lora"],
        "adapter": plan.stages[1].parameters["own_task_adapter"],
        "sent": plan.stages[1].sent,
        "up_bytes": plan.stages[1].up_bytes,
        "down_bytes": plan.stages[2].down_bytes,
        "micro_batch": plan.batch.examples,
        "tokens": plan.tokens,
        "memory_bytes": max(part.total for part in memory),
        "largest_micro_batch": {
            str(size): min(part.largest_micro_batch(size * 2**30, batch) for part in memory)
            for size in GPU_GIB
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the result file, or print one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the tiny base, write nothing")
    if parser.parse_args(arguments).quick:
        print(json.dumps(figures("experiment=demo"), indent=2))
        return
    results = {title: figures(overrides) for title, overrides in CASES.items()}
    write_record(RESULT, results, packages=("pilot-flwr", "torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
