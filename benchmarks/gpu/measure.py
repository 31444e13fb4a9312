"""Measure the loops, and the package around them."""

import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from connector import peak_bytes

from gpu.loops import PilotLoop, PlainLoop
from gpu.sizes import TASKS, Size
from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.client.personalization import Received, personalize_as_trained
from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.model.memory import Stage, training_memory

Figures = dict[str, Any]


class Variant(NamedTuple):
    """A loop to measure: `stage` is 1 or 2, or 0 for the plain loop."""

    stage: int
    checkpointing: bool

    def build(self, size: Size, device: torch.device) -> PilotLoop | PlainLoop:
        """Build the loop with its own base."""
        if self.stage == 0:
            return PlainLoop(size, device, checkpointing=self.checkpointing)
        return PilotLoop(size, device, stage=self.stage, checkpointing=self.checkpointing)

    def named(self) -> Figures:
        """Return the case as in a result file."""
        return {
            "loop": "pilot" if self.stage else "plain",
            "stage": self.stage or None,
            "gradient_checkpointing": self.checkpointing,
        }


VARIANTS = [Variant(stage, checkpointing) for checkpointing in (False, True) for stage in (1, 0, 2)]


class Planned:
    """The estimates of `pilot-flwr plan` for a size.

    Parameters
    ----------
    size : Size
        The model.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self.config = size.base_config()

    def memory(self, variant: Variant, micro_batch: int) -> Any:
        """Return the estimate for one of the package's loops; the plain one has none."""
        config = self.size.config(checkpointing=variant.checkpointing)
        stage = Stage(config, TASKS, variant.stage)
        return training_memory(stage, self.size.batch(micro_batch))

    def largest(self, variant: Variant, device_bytes: int) -> int:
        """Return the largest micro-batch that fits by the plan (plain loop: that of stage 1)."""
        estimate = self.memory(Variant(variant.stage or 1, variant.checkpointing), 8)
        return int(estimate.largest_micro_batch(device_bytes, self.size.batch(8)))


def ladder(largest: int, most: int) -> list[int]:
    """Return 1, 2, 4 … and `largest`, but none above `most`."""
    end = max(1, min(largest, most))
    return sorted({2**i for i in range(end.bit_length())} | {end})


def matrix_rate(side: int, device: torch.device, *, repeats: int = 10, group: int = 10) -> float:
    """Return the rate of bfloat16 products of square matrices, in FLOP/s: the median."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _ in range(group):
            left @ right
        _synchronize(device)
        seconds.append((time.perf_counter() - started) / group)
    return float(2 * side**3 / statistics.median(seconds[1:]))


def measure_variant(
    variant: Variant,
    size: Size,
    device: torch.device,
    *,
    micro_batches: Sequence[int],
    steps: int,
) -> list[Figures]:
    """Measure one loop at every micro-batch, up to the first that does not fit."""
    loop = variant.build(size, device)
    cases: list[Figures] = []
    for micro_batch in micro_batches:
        found: Figures = {"out_of_memory": True}
        if not (cases and cases[-1]["out_of_memory"]):
            found = measure_case(loop, micro_batch, steps, device)
        cases.append({**variant.named(), "micro_batch": micro_batch, **found})
    del loop
    clean(device)
    return cases


def measure_case(
    loop: PilotLoop | PlainLoop, micro_batch: int, steps: int, device: torch.device
) -> Figures:
    """Return median seconds of a step and peak memory, or a note that it did not fit."""
    clean(device)
    seconds: list[float] = []

    def run() -> None:
        seconds[:] = loop.seconds(micro_batch, steps)

    fits = True
    try:
        peak = resident_bytes(loop.model, device) + peak_bytes(run, device)
        if device.type == "cpu":  # a profiler counts memory there, which takes time
            run()
    except torch.OutOfMemoryError:
        fits = False  # cleaned up below, once the error holds no tensors
    loop.release()
    clean(device)
    if not fits:
        return {"out_of_memory": True}
    return {
        "out_of_memory": False,
        "seconds_per_step": statistics.median(seconds),
        "peak_bytes": peak,
    }


def resident_bytes(model: torch.nn.Module, device: torch.device) -> int:
    """Return the bytes before a step: on a GPU all that is allocated, otherwise the model."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def measure_switch(size: Size, device: torch.device, *, repeats: int) -> Figures:
    """Time making a warm base another client's personalised stage-2 model.

    Private states come from disk (from the operating system's cache, after the first time), the
    task adapters and the LoRA from memory, as they come from a server.
    """
    model = PilotLoop(size, device, stage=2).model
    private = {name: model.state(name) for name, row in GROUPS.items() if row.private}
    sent = getattr(torch, model.config.wire_dtype)
    lora, adapter = (
        {name: tensor.to(sent) for name, tensor in model.state(group).items()}
        for group in ("lora", "own_task_adapter")
    )
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        stores = [PrivateStore(Path(folder) / name, name, TASKS[0]) for name in ("a", "b")]
        for store in stores:
            store.save(PrivateState(2, TASKS, private), server_round=1)
        for repeat in range(repeats + 1):
            _synchronize(device)
            started = time.perf_counter()
            received = Received(TASKS[0], TASKS, dict.fromkeys(TASKS, adapter), lora)
            personalize_as_trained(model, stores[repeat % 2].load(), received)
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
    sizes = [*private.values(), lora, *([adapter] * len(TASKS))]
    moved = sum(tensor.nbytes for state in sizes for tensor in state.values())
    return {"seconds": statistics.median(seconds[1:]), "repeats": repeats, "bytes": moved}


def measure_compile(size: Size, device: torch.device, *, micro_batch: int, steps: int) -> Figures:
    """Return seconds of a step with and without `model.compile`, stage 1, no checkpointing."""
    found: Figures = {"micro_batch": micro_batch}
    for compiled in (False, True):
        loop = PilotLoop(size, device, stage=1, compiled=compiled)
        case = measure_case(loop, micro_batch, steps, device)
        found["on" if compiled else "off"] = case
        del loop
        clean(device)
    return found


def clean(device: torch.device) -> None:
    """Release unreferenced GPU memory."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
