"""Benchmark a training step of eight families on the CPU against transformers and peft alone.

Both stages of `pilot_flwr.client.training.train` with kept features are compared with a plain loop
(``gpu/loops.py``): the same inputs, a bfloat16 base, LoRA of rank 64 on the same layers, AdamW,
micro-batch 1 with one image of 336 x 336 and 128 tokens of text, 32 of them answers. Each loop runs
in a process of its own, in turn with the others.

Weights are random. Where a family has no model of 0.5 B parameters, a larger one is cut to a few
layers, at least two; width and vocabulary stay. So the logits, which the plain loop computes at
every position, have a larger share of time and memory than in the whole model.

Goals: never slower, and at most 0.7 times the peak resident memory of the process.

Run ``python benchmarks/training_step.py`` (about 45 minutes, 10 GiB) to update
``benchmarks/results/training_step.json``, with ``--family NAME`` for one family (results of the
same commit are kept), or ``--quick`` for a smoke test.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from _memory import resident_from_now, status_bytes
from _record import RESULTS, commit, write_record
from _timing import summarize
from gpu.measure import Variant
from gpu.sizes import PAPER, SIZES, Size

from pilot_flwr.model.pilot_model import empty_base

Figures = dict[str, Any]

RESULT = RESULTS / "training_step.json"
GOALS = {"seconds": 1.0, "peak_bytes": 0.7}
LOOPS = {"stage1": 1, "plain": 0, "stage2": 2}
RATIOS = {stage: (stage, "plain") for stage in ("stage1", "stage2")}

FAMILIES = {
    "llava": SIZES["llava-interleave-0.5b"],
    "llava_next": Size("llava-hf/llava-v1.6-mistral-7b-hf", PAPER, layers=(2, 3)),
    "llava_onevision": Size("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", PAPER),
    "qwen2_5_vl": Size("Qwen/Qwen2.5-VL-3B-Instruct", PAPER, layers=(2, 2)),
    "qwen3_vl": Size("Qwen/Qwen3-VL-4B-Instruct", PAPER, layers=(3, 3)),
    "internvl": Size("OpenGVLab/InternVL3-2B-hf", PAPER, layers=(2, 2)),
    "gemma3": Size("google/gemma-3-4b-it", PAPER, layers=(2, 2)),
    "smolvlm": Size("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", PAPER),
}
"""``model_type`` → model to measure. Idefics3's model is built as SmolVLM's."""


def measure_loop(size: Size, stage: int, steps: int) -> Figures:
    """Return one loop's median seconds of a step and its memory; run it in a new process."""
    loop = Variant(stage, checkpointing=False).build(size, torch.device("cpu"))
    loaded = resident_from_now()
    seconds = loop.seconds(1, steps)
    peak = status_bytes("VmHWM")
    return {
        "trained": sum(p.numel() for p in loop.model.parameters() if p.requires_grad),
        "seconds": statistics.median(seconds),
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "above_bytes": peak - loaded,
    }


def measure_family(size: Size, *, steps: int, runs: int) -> Figures:
    """Measure the three loops in turn, `runs` times."""
    measured: dict[str, list[Figures]] = {name: [] for name in LOOPS}
    for _ in range(runs):
        for name, stage in LOOPS.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                plain = replace(size)  # without its processor, which cannot be sent
                measured[name].append(process.submit(measure_loop, plain, stage, steps).result())
    return describe(size) | summary(measured)


def summary(measured: dict[str, list[Figures]]) -> Figures:
    """Return medians over the runs, and medians and ranges of the ratios to the plain loop."""
    times = {name: [run["seconds"] for run in runs] for name, runs in measured.items()}
    found = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in measured.items()
    }
    seconds = summarize({"wall": times}, RATIOS)["wall"]
    ratios = {
        stage: {
            "seconds": seconds["ratio"][stage],
            "seconds_range": seconds["ratio_range"][stage],
            **{
                key: found[stage][key] / found["plain"][key]
                for key in ("peak_bytes", "above_bytes")
            },
        }
        for stage in RATIOS
    }
    return {"loops": found, "ratios": ratios}


def describe(size: Size) -> Figures:
    """Describe a model as it is measured; its parameters are counted without content."""
    base = empty_base(size.base_config())
    return {
        "path": size.path,
        "layers": list(size.layers) or None,
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "image_tokens": len(size.image_tokens()),
    }


def kept_families() -> Figures:
    """Return the families in the result file, if they are of the checked-out commit."""
    if not RESULT.exists():
        return {}
    record = json.loads(RESULT.read_text())
    same = record["commit"]["id"] == commit()["id"]
    families: Figures = record["results"]["families"] if same else {}
    return families


def main(arguments: Sequence[str] | None = None) -> Figures:
    """Measure, print, and update the result file after every family unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, help="measure one; default: all")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run")
    parser.add_argument("--runs", type=int, default=3, help="processes of each loop")
    parser.add_argument("--quick", action="store_true", help="tiny-llava alone, write nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        results = measure_family(SIZES["tiny"], steps=1, runs=1)
        print(json.dumps(results, indent=2))
        return results
    families = kept_families() if options.family else {}
    for name in [options.family] if options.family else FAMILIES:
        families[name] = measure_family(FAMILIES[name], steps=options.steps, runs=options.runs)
        results = {
            "image": list(FAMILIES[name].image),
            "text_tokens": FAMILIES[name].text_tokens,
            "answer_tokens": FAMILIES[name].answer_tokens,
            "rank": PAPER.rank,
            "steps": options.steps,
            "runs": options.runs,
            "goals": GOALS,
            "families": {known: families[known] for known in FAMILIES if known in families},
        }
        write_record(RESULT, results, packages=("pilot-flwr", "torch", "transformers", "peft"))
        print(json.dumps({name: families[name]}, indent=2), flush=True)
    return results


if __name__ == "__main__":
    main()
