"""Benchmark local training on a GPU at the shape of LLaVA-1.5-7B, or of Qwen2.5-VL-3B.

Random weights are made on the device, so no checkpoint is needed: one image (576 image tokens in
LLaVA) and 128 text tokens of which 32 carry labels, LoRA of rank 64 on all linear layers, a
bfloat16 base, float32 adapters, AdamW. Measured are

- time and peak memory of a step of `pilot_flwr.client.training.train`, in stage 1 and stage 2 (T =
  3), with and without gradient checkpointing, by micro-batch, features of the vision tower kept;
- the same for a plain loop with transformers and peft: vision tower, LoRA, trained projector, the
  model's own loss over all positions;
- utilisation: the operations that a step needs (``arithmetic.py``), as a share of the device's own
  bfloat16 matrix rate;
- a client switch on a warm base, `model.compile` on and off, and the plan's memory estimate
  against the measured peak.

Run ``python benchmarks/gpu/run.py`` (about 10 minutes on a GPU of 80 GB) to update
``benchmarks/results/gpu.json``; it is written after every part, so a stopped run keeps its results.
``--size qwen2.5-vl-3b`` measures that model, with an image of 480 x 640, into a file of its own.
Without a GPU the tiny model is measured as a smoke test, and only ratios are written, to
``gpu_tiny_cpu.json``. ``--quick`` writes nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, write_record

from gpu.figures import GOALS, best, comparisons, complete, merged, without_times
from gpu.measure import (
    VARIANTS,
    Planned,
    clean,
    ladder,
    matrix_rate,
    measure_compile,
    measure_switch,
    measure_variant,
)
from gpu.sizes import SIZES

PACKAGES = ("torch", "transformers", "peft")


def measure(
    name: str,
    device: torch.device,
    *,
    steps: int,
    rounds: int,
    most: int,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure everything.

    Parameters
    ----------
    name : str
        A key of `SIZES`.
    device : torch.device
        Where.
    steps, rounds : int
        Steps that count of each case, and how often all cases are measured in turn.
    most : int
        Largest micro-batch to try.
    save : callable
        Gets the results after every part.
    """
    size = SIZES[name]
    planned = Planned(size)
    rate = matrix_rate(size.matrix, device)
    clean(device)
    results = {
        "size": _size(name),
        "device": describe(device),
        "steps": steps,
        "rounds": rounds,
        "goals": GOALS,
        "matrix_flops": rate,
        "complete": False,
    }
    measured: list[list[dict[str, Any]]] = []
    for _ in range(rounds):
        measured.append([])
        for variant in VARIANTS:
            micro_batches = ladder(_largest(planned, variant, device), most)
            measured[-1] += measure_variant(
                variant, size, device, micro_batches=micro_batches, steps=steps
            )
            if rounds == 1:
                save(results | {"cases": measured[0]})
    cases = [complete(case, planned, rate) for case in merged(measured)]
    results |= {"cases": cases, "comparisons": comparisons(cases), "best": best(cases)}
    save(results)
    results["switch"] = measure_switch(size, device, repeats=7)
    clean(device)
    save(results)
    results["compile"] = None
    if device.type == "cuda":
        results["compile"] = measure_compile(size, device, micro_batch=_middle(cases), steps=steps)
    results["complete"] = True
    save(results)
    return results


def describe(device: torch.device) -> dict[str, Any]:
    """Describe the device."""
    if device.type == "cpu":
        return {"type": "cpu", "note": "tiny model on a CPU: shows that it works, not how fast"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="default: 7b on a GPU, tiny on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each case")
    parser.add_argument("--rounds", type=int, help="default: 1 on a GPU, 3 on a CPU")
    parser.add_argument("--most", type=int, help="largest micro-batch; default: 64, on a CPU 2")
    parser.add_argument("--quick", action="store_true", help="tiny on a CPU, write nothing")
    options = parser.parse_args(arguments)
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cpu" if options.quick else kind)
    on_gpu = device.type == "cuda"
    name = options.size or ("llava-1.5-7b" if on_gpu else "tiny")
    out = options.out or RESULTS / default_file(name, device)

    def save(results: dict[str, Any]) -> None:
        if not options.quick:
            kept = results if on_gpu else without_times(results)
            write_record(out, kept, packages=PACKAGES)

    results = measure(
        "tiny" if options.quick else name,
        device,
        steps=1 if options.quick else options.steps,
        rounds=1 if options.quick else options.rounds or (1 if on_gpu else 3),
        most=1 if options.quick else options.most or (64 if on_gpu else 2),
        save=save,
    )
    print(json.dumps(results if on_gpu else without_times(results), indent=2))
    return results


def default_file(name: str, device: torch.device) -> str:
    """Return the result file's name: ``gpu.json`` for the documentation's figures."""
    if device.type == "cuda" and name == "llava-1.5-7b":
        return "gpu.json"
    return f"gpu_{name}_{device.type}.json"


def _size(name: str) -> dict[str, Any]:
    size = SIZES[name]
    return {
        "name": name,
        "path": size.path,
        "text_tokens": size.text_tokens,
        "answer_tokens": size.answer_tokens,
        "rank": size.lora.rank,
        "alpha": size.lora.alpha,
    }


def _largest(planned: Planned, variant: Any, device: torch.device) -> int:
    """Return the largest micro-batch by the plan; without a GPU there is no limit."""
    if device.type == "cpu":
        return 2**30
    return planned.largest(variant, torch.cuda.get_device_properties(device).total_memory)


def _middle(cases: Sequence[dict[str, Any]]) -> int:
    """Return half the largest micro-batch of stage 1 without checkpointing."""
    done = [
        case["micro_batch"]
        for case in cases
        if case["stage"] == 1 and not case["gradient_checkpointing"] and not case["out_of_memory"]
    ]
    return max(1, max(done, default=2) // 2)


if __name__ == "__main__":
    main()
