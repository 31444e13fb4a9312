"""Derive figures from the measured cases: throughput, utilisation, ratios, best of each loop.

Pure functions; nothing is measured here.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from gpu.arithmetic import operations
from gpu.measure import Planned, Variant
from gpu.sizes import TASKS

Figures = dict[str, Any]

GOALS = {"time_to_plain": 1.0, "peak_to_plain": 0.5, "utilisation": 0.5, "switch_seconds": 1.0}
"""Goals: maxima for the first two and the last, a minimum for the third."""

TIMES = {
    "seconds",
    "seconds_per_step",
    "tokens_per_second",
    "examples_per_second",
    "matrix_flops",
    "utilisation",
    "hardware_utilisation",
}
"""Figures that mean nothing for a GPU if measured on a CPU."""


def merged(rounds: Sequence[Sequence[Figures]]) -> list[Figures]:
    """Return the cases with the medians of their seconds over the rounds.

    A case that did not fit in one round did not fit. `round_seconds` keeps each round's.
    """
    cases = []
    for same in zip(*rounds, strict=True):
        fits = not any(case["out_of_memory"] for case in same)
        case = {**same[0], "out_of_memory": not fits}
        if fits:
            seconds = [one["seconds_per_step"] for one in same]
            case |= {
                "seconds_per_step": statistics.median(seconds),
                "round_seconds": seconds,
                "peak_bytes": max(one["peak_bytes"] for one in same),
            }
        cases.append(case)
    return cases


def complete(case: Figures, planned: Planned, matrix_flops: float) -> Figures:
    """Add throughput to a case and, if it is one of the package's own, arithmetic and plan."""
    if case["out_of_memory"]:
        return case
    size, seconds, micro_batch = planned.size, case["seconds_per_step"], case["micro_batch"]
    batch = size.batch(micro_batch)
    tokens = micro_batch * (batch.image_tokens + batch.text_tokens)
    found = {
        **case,
        "examples_per_second": micro_batch / seconds,
        "tokens_per_second": tokens / seconds,
    }
    if case["loop"] == "plain":
        return found
    needed = operations(
        planned.config,
        batch,
        rank=size.lora.rank,
        stage=case["stage"],
        tasks=len(TASKS),
    )
    done = needed.total + case["gradient_checkpointing"] * needed.recomputed
    variant = Variant(case["stage"], case["gradient_checkpointing"])
    expected = planned.memory(variant, micro_batch).total
    return {
        **found,
        "operations": needed._asdict(),
        "utilisation": needed.total / seconds / matrix_flops,
        "hardware_utilisation": done / seconds / matrix_flops,
        "planned_bytes": expected,
        "planned_to_measured": expected / case["peak_bytes"],
    }


def comparisons(cases: Sequence[Figures]) -> list[Figures]:
    """Return ratios to the plain loop at every micro-batch that both could run."""
    done = [case for case in cases if not case["out_of_memory"]]
    found = []
    for own in done:
        for plain in done:
            alike = all(own[key] == plain[key] for key in ("gradient_checkpointing", "micro_batch"))
            if own["loop"] == "pilot" and plain["loop"] == "plain" and alike:
                ratios = [
                    a / b for a, b in zip(own["round_seconds"], plain["round_seconds"], strict=True)
                ]
                found.append(
                    {
                        "stage": own["stage"],
                        "gradient_checkpointing": own["gradient_checkpointing"],
                        "micro_batch": own["micro_batch"],
                        "time_to_plain": statistics.median(ratios),
                        "time_to_plain_range": [min(ratios), max(ratios)],
                        "peak_to_plain": own["peak_bytes"] / plain["peak_bytes"],
                    }
                )
    return found


def best(cases: Sequence[Figures]) -> list[Figures]:
    """Compare the fastest case of each stage and checkpointing setting with the plain best.

    Times are per example; a micro-batch that did not fit is ignored.
    """
    found = []
    for checkpointing in (False, True):
        plain = _fastest(cases, Variant(0, checkpointing))
        for stage in (1, 2):
            own = _fastest(cases, Variant(stage, checkpointing))
            if own is None:
                continue
            row = {
                "stage": stage,
                "gradient_checkpointing": checkpointing,
                "micro_batch": own["micro_batch"],
                "examples_per_second": own["examples_per_second"],
                "tokens_per_second": own["tokens_per_second"],
                "peak_bytes": own["peak_bytes"],
                "utilisation": own["utilisation"],
                "hardware_utilisation": own["hardware_utilisation"],
            }
            if plain is not None:
                row |= {
                    "plain_micro_batch": plain["micro_batch"],
                    "time_to_plain": plain["examples_per_second"] / own["examples_per_second"],
                    "peak_to_plain": own["peak_bytes"] / plain["peak_bytes"],
                }
            found.append(row)
    return found


def without_times(results: Any) -> Any:
    """Drop `TIMES` and the seconds of rounds at every depth."""
    if isinstance(results, list):
        return [without_times(item) for item in results]
    if isinstance(results, dict):
        dropped = TIMES | {"round_seconds"}
        return {key: without_times(v) for key, v in results.items() if key not in dropped}
    return results


def _fastest(cases: Sequence[Figures], variant: Variant) -> Figures | None:
    same = [
        case
        for case in cases
        if not case["out_of_memory"] and variant.named().items() <= case.items()
    ]
    return max(same, key=lambda case: case["examples_per_second"], default=None)
