"""Export a personalised model as a folder that loads without this package.

The folder holds the LoRA in peft's own format, the connector as safetensors, a description of
its architecture, a copy of `pilot_flwr.inference.modeling_pilot`, which loads both, and a model
card. It names the base model; only one that ships with this package is copied.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from safetensors.torch import save_file

from pilot_flwr import __version__
from pilot_flwr.algorithm.fedex_lora import joined
from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.loading import to_yaml
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.schema import RunConfig
from pilot_flwr.errors import ModelError, RunError
from pilot_flwr.inference import modeling_pilot
from pilot_flwr.inference.runs import Run, Selected, last_scores
from pilot_flwr.metrics import METRICS
from pilot_flwr.model.architectures import token_channels
from pilot_flwr.model.checkpoints import BUNDLE, checkpoint_path
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import GroupName, State
from pilot_flwr.run.tables import markdown

_CONNECTOR_GROUPS: dict[GroupName, str] = {
    "own_task_adapter": "own",
    "foreign_task_adapters": "task_adapters",
    "client_adapter": "client_adapter",
    "cross_task_adapters": "cross_task_adapters",
    "router": "router",
}


def new_folder(folder: Path) -> None:
    """Create an export's folder; raise `RunError` if that fails or it is not empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RunError(f"{folder} is not empty; choose another folder for the export.")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}.") from None


def check_exportable(run: Run, selected: Selected) -> None:
    """Raise `ModelError` if a model's LoRA has another weight for every question."""
    if selected.private is not None and run.config.train.personal.by_question:
        raise ModelError(
            f"The personalised model of client {selected.name!r} cannot be exported: it weights "
            "its personal LoRA for every question (`train.personal.weighting=similarity`), which "
            "no fixed LoRA computes. Export it with the same weight for all questions "
            "(`train.personal.weighting=fixed`), or the consensus model of its task (`--task`)."
        )


def export_model(
    model: PilotModel,
    folder: Path,
    *,
    client_adapter: bool,
    end_token_ids: list[int],
    data: DataConfig,
) -> None:
    """Write a loaded model.

    Parameters
    ----------
    model : PilotModel
        For instance from `pilot_flwr.inference.runs.load_model`.
    folder : Path
        New or empty.
    client_adapter : bool
        Whether to write ψ_s; it is inert in a consensus model.
    end_token_ids : list of int
        Tokens that end an answer.
    data : DataConfig
        Says how images are read, and whether they are padded to squares.

    Raises
    ------
    ModelError, RunError
        The format does not cover all parameters of the model, or the folder is not empty.
    """
    new_folder(folder)
    groups, connector = model.groups(), model.connector
    known = {"base", "lora", "residual", *_CONNECTOR_GROUPS}
    if unknown := [group for group, named in groups.items() if named and group not in known]:
        raise ModelError(f"The export format does not cover the parameters {', '.join(unknown)}.")
    used = getattr(connector, "use_client_adapter", True)
    client_adapter &= bool(groups["client_adapter"]) and used
    base = _base(model.config, folder)
    description = {
        "format": modeling_pilot.FORMAT,
        "base": base,
        "connector": {
            "stage": model.stage,
            "tasks": list(getattr(connector, "tasks", (model.own_task,))),
            "client_adapter": client_adapter,
            "cross_task_adapters": bool(groups["cross_task_adapters"]),
            "place": model.spec.projector,
            "side": model.spec.side(model.base.config),
            "square": model.spec.square,
            "router_channels": token_channels(model.base.config),
            "dtype": model.config.adapter_dtype,
            "router_dtype": model.config.router_dtype,
        },
        "end_token_ids": end_token_ids,
        "image_aspect_ratio": data.image_aspect_ratio,
        "image_reading": data.image_reading,
    }
    tensors = _connector_tensors(model, client_adapter=client_adapter)
    save_file(tensors, folder / "connector.safetensors", metadata={"format": "pt"})
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / "connector.json").write_text(text + "\n", encoding="utf-8")
    export_lora(model, folder / "lora", base=base["path"])
    shutil.copyfile(str(modeling_pilot.__file__), folder / "modeling_pilot.py")


def export_lora(model: PilotModel, folder: Path, *, base: str) -> None:
    """Write Θ_l in peft's format, for a `PeftModel` around the whole base model.

    A frozen LoRA beside it is appended to the factors, at the same scale α / r: the residual of
    exact aggregation, or the received LoRA, weighted as the personal one beside it.
    """
    lora, state, beside = model.config.lora, model.state("lora"), model.state("residual")
    if model.share is not None:
        state, beside = _weighted(state, model.share), _weighted(beside, 1 - model.share)
    if beside:
        state = joined(state, beside)
    rank = len(next(tensor for name, tensor in state.items() if name.endswith("lora_A")))
    targets = "|".join(map(re.escape, lora.targets))
    decoder = next(name for name, m in model.base.named_modules() if m is model.decoder)
    peft.LoraConfig(
        r=rank,
        lora_alpha=lora.alpha * (rank / lora.rank),
        lora_dropout=lora.dropout,
        # A pattern, since the vision tower has layers of the same names.
        target_modules=rf"{re.escape(decoder)}\..*\.({targets})",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {
        f"base_model.model.{decoder}.{name}.weight": tensor for name, tensor in state.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _weighted(lora: State, weight: float) -> State:
    """Multiply the product B A of every layer."""
    return {name: weight * t if name.endswith("lora_B") else t for name, t in lora.items()}


def _connector_tensors(model: PilotModel, *, client_adapter: bool) -> State:
    """Name the connector's tensors as in `modeling_pilot.Connector`."""
    own = f"task_adapters.{model.own_task}" if model.stage == 2 else "task_adapter"
    return {
        f"{own if prefix == 'own' else prefix}.{name.replace('/', '.')}": tensor
        for group, prefix in _CONNECTOR_GROUPS.items()
        if group != "client_adapter" or client_adapter
        for name, tensor in model.state(group).items()
    }


def _base(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Describe the base model; copy it if it ships with this package."""
    shipped = checkpoint_path(config.path)
    included = shipped != config.path
    if included:
        shutil.copytree(shipped, folder / "base", ignore=shutil.ignore_patterns(BUNDLE))
    described = ("path", "revision", "dtype", "quantization")
    return {name: getattr(config, name) for name in described} | {"included": included}


Merged = Literal["", "plain", "wide"]
"""Not merged, or merged into transformers' class or into a wider subclass of it."""

_LOAD: dict[Merged, str] = {
    "": """In this folder, with torch, transformers and peft:

```python
from modeling_pilot import load
model, processor = load(".")
```

`load(folder, base)` loads the base model from `base` instead of the path in `connector.json`;
further arguments go to its `from_pretrained` (`device_map`, `dtype`, `quantization_config`). Every
key of every file is checked. `lora/` is in peft's own format. The connector replaces the base's
projector: use both parts together.""",
    "plain": """A plain Hugging Face checkpoint:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
```""",
    "wide": """The projector's hidden layer is wider than transformers' own class allows (it ties
the width to `text_config.hidden_size`), so this folder contains a class for it in
`modeling_wide.py`; read it before you trust it:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".")
```""",
}

_QUANTIZED = """The model was tuned on a 4-bit base (NF4, double quantization, without vision tower
and projector), but `load` does not quantize the base unless you pass the same
`quantization_config`."""


def model_card(
    run: Run, selected: Selected, *, stage: int, merged: Merged = "", dtype: str = ""
) -> str:
    """Return the model card in Markdown: origin, how to load and prompt the model, its scores.

    `stage` is the model's architecture, `merged` the class of a merged checkpoint and `dtype` its
    precision.
    """
    base, recorded = run.config.model, replace(run.recorded, run=RunConfig())
    parts = [
        _front_matter(base.path),
        f"# {run.config.name}: {selected.name}",
        _origin(run, selected, stage),
        *([f"Merged from the unquantised base, in {dtype}."] if merged else []),
        "## Load",
        _LOAD[merged],
        *([_QUANTIZED] if base.quantization != "none" and not merged else []),
        "## Prompts",
        _prompts(run, selected),
        "## Scores in the run",
        _scores(run, selected),
        "## Licence",
        f"The licence of the base model `{base.path}` covers derived models, and that of the "
        "training data may too. The code in this folder is under Apache 2.0.",
        "## Versions",
        f"pilot-flwr {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__} at the time of this export.",
        "## The run's configuration",
        f"```yaml\n{to_yaml(recorded).strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str) -> str:
    hub = base.count("/") == 1 and not base.startswith("/")
    lines = [
        "---",
        *([f"base_model: {base}"] if hub else []),
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [federated-learning, pilot, llava]",
        "---",
    ]
    return "\n".join(lines)


def _origin(run: Run, selected: Selected, stage: int) -> str:
    origin = (
        f"`{run.config.model.path}`, tuned by pilot-flwr (Pilot: Xiong et al., AAAI 2025, arXiv "
        f"2501.13985) with the method `{run.recorded.strategy.name}`"
    )
    task, after = f"task `{selected.task}`", f"after exchange {run.checkpoint.server_round}"
    if selected.private is None:
        return (
            f"{origin}: the consensus model of {task} {after}. It has the task's averaged adapter "
            "and the mean LoRA of the task's clients, and no private parameters."
        )
    first = "stage 1 (ψ_t + ψ_s)" if run.config.model.client_adapter else "stage 1 (ψ_t)"
    warning = (
        " **It contains adapters that never left the client during the run; adapters can leak "
        "information about the data they were trained on.**"
    )
    return (
        f"{origin}: the personalised model of client `{selected.name}`, {task}, {after}, in "
        f"{first if stage == 1 else 'stage 2 (CT-MoA)'}."
        + ("" if selected.private.empty else warning)
    )


def _prompts(run: Run, selected: Selected) -> str:
    data, lines = run.config.data, ["The base model's own chat template."]
    if suffix := run.prompt_suffix(selected.task):
        lines.append(f"Every question of the task ended with the line `{suffix}`.")
    if run.config.model.system_prompt:
        lines.append(
            f"Every conversation began with the system prompt `{run.config.model.system_prompt}`."
        )
    lines.append(
        "Images were read as in LLaVA's code: transparency dropped, EXIF orientation ignored."
        if data.image_reading == "official"
        else "Images were read as viewers show them: transparency on white, turned upright."
    )
    if data.image_aspect_ratio == "pad":
        lines.append("Images were padded to a square in the image processor's mean colour.")
    lines += [
        "The run scored greedy answers (`do_sample=False`).",
        "In conversations of several turns, the tokenizer's end token followed every answer, even "
        "if the template omits it.",
    ]
    return " ".join(lines)


def _scores(run: Run, selected: Selected) -> str:
    rows = [event for event in last_scores(run) if event.task == selected.task]
    if selected.client is not None:
        rows = [event for event in rows if event.client == selected.client.id]
    if not rows:
        return "The run recorded no scores."
    table = [["client", "metric", "test examples", "score"]]
    for event in rows:
        metric = METRICS[event.metric]
        title = metric.title + (" (approximate)" if metric.approximate() else "")
        table.append([event.client, title, str(event.examples), f"{event.score:.3f}"])
    if selected.private is None:
        note = "Scores of the clients' personalised models, not of this consensus model."
        return f"{markdown(table)}\n{note}"
    return markdown(table).strip()
