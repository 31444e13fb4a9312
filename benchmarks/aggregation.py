"""Benchmark the aggregation of few large and of many small LoRAs, and its costs by K and P.

Goals: 16 clients with 20 M parameters in at most twice the time of Flower's own weighted average
``flwr...strategy_utils.aggregate_arrayrecords``; 1,000 clients with 100,000 parameters in at most
twice the time of one float64 product X X^T of the same matrix; extra peak memory of at most the
output plus one stacked tensor; distances within 1e-6 relative of a float64 reference when all
clients share an offset 1,000 times their differences.

Run ``python benchmarks/aggregation.py`` (about 6 minutes, 10 GiB) to update
``benchmarks/results/aggregation.json``, or ``--quick`` for a smoke test.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _memory import resident_from_now, status_bytes
from _record import RESULTS, write_record
from _timing import summarize, take_turns
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from pilot_flwr.algorithm.aggregation import (
    adaptive_weights,
    mix,
    pairwise_distances,
    sketched_distances,
)

State = dict[str, np.ndarray]

# Llama-2-7B's linear layers (out, in); LoRA r=8 on all of them, 32 times, has 20.0 M parameters.
HIDDEN, INNER = 4096, 11008
LINEAR = {name: (HIDDEN, HIDDEN) for name in ("q", "k", "v", "o")}
LINEAR |= {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
NEIGHBORS = 3
OFFSET = 1000  # the clients' common offset, in units of their differences


def make_states(clients: int, layers: int, rank: int) -> list[State]:
    """Draw LoRA states around a common point, `OFFSET` times as long as the differences."""
    shapes = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEAR.items():
            shapes[f"{layer}.{name}.lora_A"] = (rank, columns)
            shapes[f"{layer}.{name}.lora_B"] = (rows, rank)
    rng = np.random.default_rng(0)
    base = {n: rng.standard_normal(shape, dtype=np.float32) for n, shape in shapes.items()}
    scale = np.float32(1 / (OFFSET * 2**0.5))  # two clients differ by sqrt(2) deviations
    return [
        {n: b + scale * rng.standard_normal(b.shape, dtype=np.float32) for n, b in base.items()}
        for _ in range(clients)
    ]


def flower_records(states: list[State]) -> list[RecordDict]:
    """Pack states as the replies that Flower's strategies average."""
    return [
        RecordDict(
            {
                "arrays": ArrayRecord({name: Array(value) for name, value in state.items()}),
                "metrics": MetricRecord({"num-examples": 100 + k}),
            }
        )
        for k, state in enumerate(states)
    ]


def flower_arithmetic(states: list[State], factors: list[float]) -> State:
    """Repeat the loop of Flower's function on decoded arrays."""
    total: State = {}
    for state, factor in zip(states, factors, strict=True):
        for name, value in state.items():
            if name not in total:
                total[name] = value * factor
            else:
                total[name] += value * factor
    return total


def aggregate(states: list[State]) -> list[dict[str, Any]]:
    """Do the server's work: distances, weights, mixtures."""
    counts = [100 + k for k in range(len(states))]
    return mix(states, adaptive_weights(pairwise_distances(states), counts, NEIGHBORS))


def measure_times(states: list[State], repeats: int) -> dict[str, Any]:
    """Time the parts alternately against Flower's average of the same arrays."""
    records = flower_records(states)
    weights = adaptive_weights(pairwise_distances(states), [1] * len(states), NEIGHBORS)
    factors = [1 / len(states)] * len(states)
    halves = [{n: torch.from_numpy(v).bfloat16() for n, v in s.items()} for s in states]
    parts: dict[str, Callable[[], object]] = {
        "flower": lambda: aggregate_arrayrecords(records, "num-examples"),
        "flower_arithmetic_alone": lambda: flower_arithmetic(states, factors),
        "distances": lambda: pairwise_distances(states),
        "mix": lambda: mix(states, weights),
        "distances_and_ata": lambda: aggregate(states),
        "distances_and_ata_bfloat16": lambda: aggregate(halves),
    }
    ratios = {
        "to_flower": ("distances_and_ata", "flower"),
        "bfloat16_to_flower": ("distances_and_ata_bfloat16", "flower"),
        "to_flower_arithmetic_alone": ("distances_and_ata", "flower_arithmetic_alone"),
    }
    return summarize(take_turns(parts, repeats=repeats), ratios)


def measure_many(clients: int, parameters: int, repeats: int) -> dict[str, Any]:
    """Time distances, weights and mixtures of many clients against one product X X^T."""
    states = many_states(clients, parameters)
    matrix = np.stack([np.concatenate([*state.values()]) for state in states]).astype(np.float64)
    parts: dict[str, Callable[[], object]] = {
        "product": lambda: matrix @ matrix.T,
        "distances_and_ata": lambda: aggregate(states),
        "sketched_distances": lambda: sketched_distances(states, seed=[0]),
    }
    ratios = {"to_product": ("distances_and_ata", "product")}
    size = {"clients": clients, "parameters": parameters, "repeats": repeats}
    return size | summarize(take_turns(parts, repeats=repeats), ratios)


def many_states(clients: int, parameters: int) -> list[State]:
    """Draw states of two tensors around a common point."""
    rng = np.random.default_rng(1)
    half = parameters // 2
    base = OFFSET * rng.standard_normal(parameters, dtype=np.float32)
    points = (base + rng.standard_normal(parameters, dtype=np.float32) for _ in range(clients))
    return [{"lora_A": point[:half], "lora_B": point[half:]} for point in points]


def measure_costs(clients: int, parameters: int, repeats: int) -> dict[str, Any]:
    """Return the median seconds of every step, for the curves over K and P."""
    states = many_states(clients, parameters)
    distances = sketched_distances(states, seed=[0])
    weights = adaptive_weights(distances, [1] * clients, NEIGHBORS)
    steps: dict[str, Callable[[], object]] = {
        "distances": lambda: pairwise_distances(states),
        "sketched_distances": lambda: sketched_distances(states, seed=[0]),
        "weights": lambda: adaptive_weights(distances, [1] * clients, NEIGHBORS),
        "mix": lambda: mix(states, weights),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {
        "clients": clients,
        "parameters": parameters,
        "repeats": repeats,
        "seconds": {n: float(f"{statistics.median(v):.3g}") for n, v in seconds.items()},
    }


def measure_memory(states: list[State]) -> dict[str, Any]:
    """Return the peak growth of the resident set during distances and mixing.

    Free heap is given back to the system first, and the kernel's high-water mark is reset.
    """
    if sys.platform != "linux":
        return {"skipped": "needs Linux's VmHWM"}
    clients = len(states)
    output = sum(value.nbytes for value in states[0].values()) * clients
    stacked = max(value.nbytes for value in states[0].values()) * clients
    weights = adaptive_weights(pairwise_distances(states), [1] * clients, NEIGHBORS)
    mix([{"warm": np.ones((8, 8), np.float32)}] * clients, np.eye(clients))
    peaks = {}
    runs: dict[str, Callable[[], object]] = {
        "distances": lambda: pairwise_distances(states),
        "mix": lambda: mix(states, weights),
    }
    for name, run in runs.items():
        before = resident_from_now()
        run()
        peaks[name] = status_bytes("VmHWM") - before
    mib = 2**20
    return {
        "method": "VmHWM after - VmRSS before, high-water mark reset, heap trimmed",
        "output_mib": round(output / mib, 2),
        "largest_stacked_tensor_mib": round(stacked / mib, 2),
        "distances_extra_peak_mib": round(peaks["distances"] / mib, 2),
        "mix_extra_peak_mib": round(peaks["mix"] / mib, 2),
        "mix_extra_beyond_output_mib": round((peaks["mix"] - output) / mib, 2),
    }


def measure_accuracy(states: list[State]) -> dict[str, Any]:
    """Compare with float64 differences pair by pair, and float64 sums tensor by tensor."""
    clients = len(states)
    squares, naive = np.zeros((clients, clients)), np.zeros((clients, clients))
    for name in states[0]:
        rows = [state[name].ravel().astype(np.float64) for state in states]
        stacked = np.stack([state[name].ravel() for state in states])
        naive += stacked @ stacked.T
        for k in range(clients):
            for j in range(k):
                difference = rows[k] - rows[j]
                squares[k, j] = squares[j, k] = squares[k, j] + difference @ difference
    pairs = ~np.eye(clients, dtype=bool)
    exact, found = np.sqrt(squares), pairwise_distances(states)
    norms = naive.diagonal()
    expanded = np.sqrt(np.abs(norms[:, None] + norms[None, :] - 2 * naive))
    weights = adaptive_weights(found, [100 + k for k in range(clients)], NEIGHBORS)
    worst = 0.0
    for name in states[0]:
        sums = np.tensordot(weights, np.stack([s[name] for s in states]).astype(np.float64), 1)
        mixed = np.stack(
            [result[name] for result in mix([{name: s[name]} for s in states], weights)]
        )
        half_ulp = np.spacing(np.abs(sums).astype(np.float32)).astype(np.float64) / 2
        worst = max(worst, float(np.max(np.abs(mixed - sums) / half_ulp)))
    return {
        "common_offset_over_differences": OFFSET,
        "distances_max_relative_error": float(
            np.max(np.abs(found / np.where(pairs, exact, 1) - 1)[pairs])
        ),
        "float32_gram_expansion_max_relative_error": float(
            np.max(np.abs(expanded / np.where(pairs, exact, 1) - 1)[pairs])
        ),
        "mix_max_error_half_ulps": round(worst, 4),
    }


def measure(clients: int, layers: int, rank: int, repeats: int) -> dict[str, Any]:
    """Draw one set of states and measure time and memory on it."""
    states = make_states(clients, layers, rank)
    parameters = sum(value.size for value in states[0].values())
    size = {"clients": clients, "parameters": parameters, "tensors": len(states[0]), "rank": rank}
    memory = measure_memory(states)
    return size | {"memory": memory, "repeats": repeats} | measure_times(states, repeats)


BY_CLIENTS = [(k, 100_000, 3) for k in (10, 30, 100, 300, 1000)] + [(3000, 100_000, 1)]
BY_PARAMETERS = [(100, p, 3) for p in (10_000, 100_000, 1_000_000, 4_000_000)]
LARGE = (1000, 1_000_000, 1)
"""K, P and repeats of the cost curves."""


def main(arguments: list[str] | None = None) -> None:
    """Run all measurements, print them, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, write nothing")
    parser.add_argument("--output", type=Path, help="another result file")
    options = parser.parse_args(arguments)
    quick = options.quick
    layers, repeats, few = (1, 2, 4) if quick else (32, 5, 16)
    output = options.output or (None if quick else RESULTS / "aggregation.json")
    curves = [(2, 1000, 1), (4, 1000, 1)] if quick else [*BY_CLIENTS, *BY_PARAMETERS, LARGE]
    results = {
        "main": measure(few, layers, 8, repeats),
        "many": measure_many(8, 1000, repeats) if quick else measure_many(1000, 100_000, repeats),
        "accuracy": measure_accuracy(make_states(few, max(1, layers // 8), 8)),
        "costs": [measure_costs(*point) for point in dict.fromkeys(curves)],
    }
    print(json.dumps(results, indent=2))
    if output:
        packages = ("pilot-flwr", "flwr", "numpy", "scipy", "threadpoolctl", "torch")
        write_record(output, results, packages=packages)


if __name__ == "__main__":
    main()
