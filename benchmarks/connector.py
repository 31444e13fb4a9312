"""Benchmark the connectors against their bare matrix products, and the difference loss.

Goals, for one image at LLaVA-1.5-7B's size (N = 576, D = 1024, C = 4096) with T = 3 tasks:
CT-MoA's forward and backward take at most 1.2 times the time of the matrix products alone, and
the difference loss at most 15 % of stage 1's forward and backward. Also, at N·C = 4,096, time and
peak memory of the loss against the official code's formula, which builds an (N·C)² matrix.

Run ``python benchmarks/connector.py`` (about 2 minutes, 2 GiB) to update
``benchmarks/results/connector.json``, or ``--quick`` for a smoke test. It uses one thread unless
``--threads`` is given, so that CPU time is meaningful.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _record import RESULTS, write_record
from _timing import Times, summarize, take_turns
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from pilot_flwr.algorithm.connector import (
    CrossTaskMoA,
    TaskClientConnector,
    copied,
    stage1_connector,
    stage2_connector,
)
from pilot_flwr.algorithm.losses import difference_loss
from pilot_flwr.config.model import ModelConfig

TASKS = ("vqa", "counting", "captioning")
RESULT = RESULTS / "connector.json"


class Size(NamedTuple):
    """Visual tokens N, vision channels D and language-model channels C of one image."""

    tokens: int
    vision: int
    channels: int


LLAVA, TINY = Size(576, 1024, 4096), Size(16, 32, 64)
FLAT, TINY_FLAT = (8, 16, 256), (4, 4, 8)
"""(B, N, C) of the comparison with the (N·C)² formula."""


def projector(size: Size) -> LlavaMultiModalProjector:
    """Return LLaVA's projector of these widths."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=size.vision, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=size.channels, num_attention_heads=1),
    )
    return LlavaMultiModalProjector(config)


class Case:
    """Both connectors on one device, with their inputs H_v and output gradients dL/dx_img."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device = device
        self.visual = self._draw(1, size.tokens, size.vision)
        self.upstream = self._draw(1, size.tokens, size.channels)
        self.hidden = self._draw(size.tokens, size.channels)
        self.projector = projector(size).to(device)
        for parameter in self.projector.parameters():
            torch.nn.init.normal_(parameter, std=size.channels**-0.5)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def stage1(self) -> TaskClientConnector:
        """Build stage 1 with two trained adapters, neither inert."""
        official = ModelConfig(initialisation="official")
        return stage1_connector(self.projector, official, last="linear_2")

    def stage2(self) -> CrossTaskMoA:
        """Build CT-MoA; ψ_s and the foreign ψ_t are frozen, as in training."""
        connector = stage2_connector(
            self.projector,
            ModelConfig(initialisation="official"),
            last="linear_2",
            channels=self.visual.shape[-1],
            tasks=TASKS,
            client_adapter=copied(self.projector),
            generator=self.generator,
        )
        connector.client_adapter.requires_grad_(False)
        for task in TASKS[1:]:
            connector.task_adapters[task].requires_grad_(False)
        return connector

    def products(self, *, trained: int, frozen: int, experts: int) -> Callable[[], None]:
        """Return the matrix products alone, into preallocated memory.

        Of each adapter two forward, and if it is trained, three backward: the gradients of both
        weights and of the hidden layer (H_v needs none). Of the router, if there are `experts`,
        one forward and one backward.
        """
        x, h, dy = self.visual[0], self.hidden, self.upstream[0]
        w1 = self.projector.linear_1.weight.detach()
        w2 = self.projector.linear_2.weight.detach()
        features, dw1, dw2 = torch.empty_like(h), torch.empty_like(w1), torch.empty_like(w2)
        phi, probs = x.new_zeros(experts, x.shape[1]), x.new_zeros(x.shape[0], experts)

        def run() -> None:
            for index in range(trained + frozen):
                torch.mm(x, w1.T, out=features)
                torch.mm(h, w2.T, out=features)
                if index < trained:
                    torch.mm(dy.T, h, out=dw2)
                    torch.mm(dy, w2, out=features)
                    torch.mm(h.T, x, out=dw1)
            if experts:
                torch.mm(x, phi.T, out=probs)
                torch.mm(probs.T, x, out=phi)

        return run


def training_pass(connector: CrossTaskMoA, case: Case) -> Callable[[], None]:
    """Return CT-MoA's forward and backward with its two losses."""

    def run() -> None:
        connector.zero_grad(set_to_none=True)
        output = connector(case.visual)
        losses = 0.1 * output.balance + 0.01 * output.z
        torch.autograd.backward([output.features, losses], [case.upstream, torch.ones_like(losses)])

    return run


def stage1_pass(connector: TaskClientConnector, case: Case, *, loss: bool) -> Callable[[], None]:
    """Return stage 1's forward and backward, with or without the difference loss."""

    def run() -> None:
        connector.zero_grad(set_to_none=True)
        if not loss:
            features = connector.task_adapter(case.visual) + connector.client_adapter(case.visual)
            features.backward(case.upstream)
            return
        output = connector(case.visual)
        weighted = 0.1 * output.difference
        torch.autograd.backward(
            [output.features, weighted], [case.upstream, torch.ones_like(weighted)]
        )

    return run


def loss_pass(
    task: Tensor, client: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], object]:
    """Return forward and backward of a loss of x_t and x_s alone."""
    inputs = tuple(x.clone().requires_grad_() for x in (task, client))
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def literal_official(task: Tensor, client: Tensor) -> Tensor:
    """Return the mean over the whole (N·C)² matrix, as the official code does."""
    task, client = task.flatten(1), client.flatten(1)
    task = task / (task.norm(dim=1, keepdim=True).detach() + 1e-6)
    client = client / (client.norm(dim=1, keepdim=True).detach() + 1e-6)
    return torch.mm(task.T, client).square().mean()


def reductions() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the losses by name: the package's, and the literal formula."""
    return {
        "official": lambda a, b: difference_loss(a, b, reduction="official"),
        "normalized": lambda a, b: difference_loss(a, b, reduction="normalized"),
        "literal": literal_official,
    }


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the rise of allocated tensor memory at its peak, in bytes.

    On a CPU, from the profiler's list of every allocation and release; on a GPU, from the
    allocator's own statistics.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    used = peak = 0
    for _, change in changes:
        used += change
        peak = max(peak, used)
    return peak


def measure_connectors(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time CT-MoA, stage 1 and the difference loss against each other."""
    case = Case(size, device)
    stage1 = case.stage1()
    with torch.no_grad():
        task, client = stage1.task_adapter(case.visual), stage1.client_adapter(case.visual)
    parts: dict[str, Callable[[], object]] = {
        "ct_moa": training_pass(case.stage2(), case),
        "ct_moa_products": case.products(trained=3, frozen=3, experts=3),
        "stage1": stage1_pass(stage1, case, loss=False),
        "stage1_products": case.products(trained=2, frozen=0, experts=0),
        "stage1_with_loss": stage1_pass(stage1, case, loss=True),
        "difference_loss": loss_pass(task, client, reductions()["normalized"]),
    }
    ratios = {
        "ct_moa_to_products": ("ct_moa", "ct_moa_products"),
        "stage1_to_products": ("stage1", "stage1_products"),
        "difference_loss_to_stage1": ("difference_loss", "stage1"),
        "stage1_with_loss_to_stage1": ("stage1_with_loss", "stage1"),
    }
    return {
        "size": size._asdict(),
        "tasks": len(TASKS),
        "goals": {"ct_moa_to_products": 1.2, "difference_loss_to_stage1": 0.15},
        **summarize(timed(parts, device, repeats), ratios),
    }


def measure_reductions(
    shape: tuple[int, int, int], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Compare the loss with the (N·C)² formula: time, peak memory, value."""
    generator = torch.Generator().manual_seed(0)
    task, client = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    losses = reductions()
    torch.testing.assert_close(losses["official"](task, client), losses["literal"](task, client))
    parts = {name: loss_pass(task, client, loss) for name, loss in losses.items()}
    ratios = {
        "literal_to_official": ("literal", "official"),
        "literal_to_normalized": ("literal", "normalized"),
    }
    return {
        "shape": dict(zip("BNC", shape, strict=True)),
        **summarize(timed(parts, device, repeats), ratios),
        "peak_bytes": {name: peak_bytes(part, device) for name, part in parts.items()},
        "peak_bytes_by": "torch.profiler" if device.type == "cpu" else "torch.cuda",
        "literal_matrix_bytes_at_llava_size": 4 * (LLAVA.tokens * LLAVA.channels) ** 2,
    }


def timed(parts: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> Times:
    """Time the parts alternately on `device`."""
    if device.type == "cuda":
        return take_turns(parts, repeats=repeats, synchronize=torch.cuda.synchronize)
    return take_turns(parts, repeats=repeats)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each part")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, write nothing")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    repeats = 1 if options.quick else options.repeats
    results = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": "float32",
        "threads": options.threads,
        "repeats": repeats,
        "connectors": measure_connectors(TINY if options.quick else LLAVA, device, repeats),
        "reductions": measure_reductions(TINY_FLAT if options.quick else FLAT, device, repeats),
    }
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(options.output, results, packages=["torch"])
    return results


if __name__ == "__main__":
    main()
