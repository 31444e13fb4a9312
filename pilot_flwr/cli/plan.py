"""``pilot-flwr plan``: estimate parameters, traffic and GPU memory before a run."""

import json
import re
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pilot_flwr.cli.common import SUCCESS, Overrides
from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:
    from pilot_flwr.model.resource_plan import Plan

_GPU_BYTES = {f"{size} GiB": size * 2**30 for size in (16, 24, 40, 80)}
_MEMORY = {
    "base": "base model",
    "adapters": "adapters and LoRA",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "activations": "activations",
    "logits": "logits of the answers",
    "reserve": "reserve",
    "total": "in all",
}


def plan(
    overrides: Overrides = None,
    image_size: Annotated[
        str,
        typer.Option(
            metavar="HxW",
            help="Size of an image in pixels; some models derive the token count from it.",
        ),
    ] = "480x640",
    text_tokens: Annotated[int, typer.Option(help="Text tokens per example.")] = 128,
    answer_tokens: Annotated[int, typer.Option(help="Labelled tokens among them.")] = 32,
    micro_batch: Annotated[
        int,
        typer.Option(
            help="Examples per forward pass.", show_default="the configured train.batch_size"
        ),
    ] = 0,
    lora_rank: Annotated[
        int,
        typer.Option(
            help="LoRA rank of one client; server and run are planned for the configured rank.",
            show_default="the configured model.lora.rank",
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Estimate what a run will train, send and need, without loading the model.

    Reports the parameters that each stage trains, sends, keeps private and freezes, the bytes per
    exchange, and the GPU memory of a training step.

    Example: `pilot-flwr plan experiment=paper`
    """
    from pilot_flwr.config.loading import check_effect, load_config
    from pilot_flwr.config.overrides import expand
    from pilot_flwr.config.rules import at_least, check_lora_rank
    from pilot_flwr.model.resource_plan import make_plan

    at_least("--text-tokens", text_tokens, 1)
    at_least("--micro-batch", micro_batch, 0)
    at_least("--answer-tokens", answer_tokens, 1)
    expanded = expand(overrides or ())
    config = load_config(shlex.join(expanded))
    check_effect(expanded, config)
    at_least("--lora-rank", lora_rank, 0)
    if lora_rank:
        check_lora_rank("--lora-rank", lora_rank, config)
    figures = make_plan(
        config,
        image_size=_size(image_size),
        text_tokens=text_tokens,
        answer_tokens=min(answer_tokens, text_tokens),
        micro_batch=micro_batch,
        lora_rank=lora_rank,
    )
    if as_json:
        memory = {stage: part.memory.total for stage, part in figures.stages.items()}
        print(json.dumps({**asdict(figures), "memory_total": memory}, indent=2))
    else:
        _show(figures, exchanges=config.strategy.rounds + 1)
    return SUCCESS


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise ConfigError(
            f"`--image-size` is {text!r} but must be height and width, such as 480x640."
        )
    return int(match[1]), int(match[2])


def _show(plan: "Plan", *, exchanges: int) -> None:
    from pilot_flwr.formatting import count, human_bytes
    from pilot_flwr.run.tables import markdown

    print(f"{plan.path} ({plan.architecture})")
    print(
        f"an image: H_v of {' x '.join(map(str, plan.batch.features))}, "
        f"{plan.batch.image_tokens} tokens, C = {plan.text_channels}"
    )
    without = f"; none on {', '.join(plan.other_layers)}" if plan.other_layers else ""
    print(f"LoRA on {', '.join(plan.lora_layers)}{without}\n")
    stages = [f"stage {stage}" for stage in plan.stages]
    parts = plan.stages.values()
    print(markdown([["parameters", *stages, "leaves the client"], *_parameter_rows(plan)]))
    up = ["sent up", *(human_bytes(part.up_bytes) for part in parts)]
    down = ["received", *(human_bytes(part.down_bytes) for part in parts)]
    kept = {
        "AdamW's moments": [part.moments_bytes for part in parts],
        "compression errors": [part.error_bytes for part in parts],
    }
    rows = [
        [f"{what}, kept on its disk", *map(human_bytes, sizes)]
        for what, sizes in kept.items()
        if any(sizes)
    ]
    print(markdown([["one client, one exchange", *stages], up, down, *rows]))
    asked, everyone = plan.server[0], plan.server[-1]
    drawn = asked.clients < everyone.clients
    sides = [f"{count(asked.clients, 'client')}{' drawn' * drawn}"]
    sides += [f"all {everyone.clients:,}"] * drawn
    rows = [
        ["the server, one exchange", *sides],
        ["receives", *(human_bytes(side.up_bytes) for side in plan.server)],
        ["sends", *(human_bytes(side.down_bytes) for side in plan.server)],
        [
            "uploads and checkpoints on its disk, at most",
            *(human_bytes(side.disk_bytes) for side in plan.server),
        ],
    ]
    print(markdown(rows))
    print(
        f"The whole run, {exchanges} exchanges{' with the clients drawn' * drawn}: "
        f"{'at most ' * drawn}{human_bytes(plan.total_bytes)} of tensors\n"
    )
    memory = [
        [title, *(_gib(getattr(part.memory, name)) for part in parts)]
        for name, title in _MEMORY.items()
    ]
    print(markdown([["GPU memory, estimated", *stages], *memory]))
    batch = plan.batch
    print(
        f"A micro-batch of {batch.examples} examples, each one image in "
        f"{batch.image_tokens} tokens and {batch.text_tokens} tokens of text, "
        f"{batch.answer_tokens} of them labelled; bfloat16 autocast."
    )
    if plan.tokens > plan.max_length:
        print(
            f"Such an example has {plan.tokens} tokens but `train.max_length` is "
            f"{plan.max_length}: it would be rejected, or cut with `train.over_long=cut`."
        )
    largest = {
        name: min(part.memory.largest_micro_batch(size, batch) for part in parts)
        for name, size in _GPU_BYTES.items()
    }
    fitting = ", ".join(f"{number or 'none'} with {name}" for name, number in largest.items())
    print(f"Largest micro-batch: {fitting}.")
    print(_fit(plan))


def _parameter_rows(plan: "Plan") -> list[list[str]]:
    from pilot_flwr.algorithm.parameter_groups import GROUPS

    parts = plan.stages.values()
    rows = []
    for group, row in GROUPS.items():
        cells = [
            f"{_millions(n)} {_extent(part.trained_of[group], n, 'trained') or 'frozen'}"
            if (n := part.parameters[group])
            else "–"
            for part in parts
        ]
        whole = max(part.parameters[group] for part in parts)
        sent = max(part.sent_of[group] for part in parts)
        never = "never" if any(part.kept_of[group] for part in parts) else "–"
        fate = _extent(sent, whole, "sent") or never
        title = "base model" if group == "base" else f"{row.symbol}  {group.replace('_', ' ')}"
        rows.append([title, *cells, fate])
    for name in ("trained", "sent", "private", "frozen"):
        sums = [_millions(getattr(part, name)) for part in parts]
        rows.append([f"{name}, in all", *sums, ""])
    return rows


def _extent(some: int, whole: int, word: str) -> str:
    """Return `word`, prefixed by `partly` if `some` is less than `whole`; empty for 0."""
    return word if some == whole > 0 else f"partly {word}" if some else ""


def _fit(plan: "Plan") -> str:
    import torch

    most = max(part.memory.total for part in plan.stages.values())
    if not torch.cuda.is_available():
        return "No GPU available for comparison."
    device = torch.cuda.get_device_properties(0)
    result = "fits" if most <= device.total_memory else "does NOT fit"
    return f"This {result} into {device.name} with {_gib(device.total_memory)}."


def _millions(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.2f} M"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
