"""A personalised model as a folder that loads without this package.

The folder holds the LoRA in peft's own format, the connector as safetensors, a description of
its architecture, the file that loads both (`pilot_flwr.results.standalone.modeling_pilot`, copied
as it is) and a model card. The base model is named, not copied, unless it ships with this package.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import save_file

from pilot_flwr.connector import CrossTaskMoA
from pilot_flwr.errors import ModelError, RunError
from pilot_flwr.exact import joined
from pilot_flwr.model.parameters import GroupName, State
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.shipped import checkpoint_path
from pilot_flwr.results.standalone import modeling_pilot
from pilot_flwr.settings.model import ModelConfig

_CONNECTOR_GROUPS: dict[GroupName, str] = {
    "own_task_adapter": "own",
    "foreign_task_adapters": "task_adapters",
    "client_adapter": "client_adapter",
    "cross_task_adapters": "cross_task_adapters",
    "router": "router",
}


def new_folder(folder: Path) -> None:
    """Make the folder of an export.

    Raises
    ------
    RunError
        It is there and holds something, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RunError(f"{folder} is not empty; choose another folder for the export.")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}.") from None


def export_model(
    model: PilotModel,
    folder: Path,
    *,
    client_adapter: bool,
    end_token_ids: list[int],
    image_aspect_ratio: str,
) -> None:
    """Write an assembled model.

    Parameters
    ----------
    model : PilotModel
        With all states loaded.
    folder : Path
        New or empty.
    client_adapter : bool
        Whether ψ_s does anything: it does not in a consensus model, and is then left out.
    end_token_ids : list of int
        Tokens that end an answer.
    image_aspect_ratio : {"keep", "pad"}
        Whether images are padded to squares.

    Raises
    ------
    ModelError
        The model has trained parameters that the exported format has no place for.
    RunError
        The folder is not empty.
    """
    new_folder(folder)
    groups = model.groups()
    known = {"base", "lora", "residual", *_CONNECTOR_GROUPS}
    if strange := [group for group, named in groups.items() if named and group not in known]:
        raise ModelError(f"The export has no place for the parameters {', '.join(strange)}.")
    connector = model.connector
    moa = isinstance(connector, CrossTaskMoA)
    client_adapter &= bool(groups["client_adapter"]) and getattr(
        connector, "use_client_adapter", True
    )
    first = model.state("own_task_adapter")
    base = _base(model.config, folder)
    description = {
        "format": modeling_pilot.FORMAT,
        "base": base,
        "connector": {
            "stage": model.stage,
            "tasks": list(connector.tasks)
            if isinstance(connector, CrossTaskMoA)
            else [model.own_task],
            "client_adapter": client_adapter,
            "cross_task_adapters": bool(groups["cross_task_adapters"]),
            "in_features": first["linear_1.weight"].shape[1],
            "out_features": first["linear_1.weight"].shape[0],
            "bias": "linear_1.bias" in first,
            "dtype": model.config.adapter_dtype,
        },
        "end_token_ids": end_token_ids,
        "image_aspect_ratio": image_aspect_ratio,
    }
    tensors = _connector_tensors(model, moa=moa, client_adapter=client_adapter)
    save_file(tensors, folder / "connector.safetensors", metadata={"format": "pt"})
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / "connector.json").write_text(text + "\n", encoding="utf-8")
    export_lora(model, folder / "lora", base=base["path"])
    shutil.copyfile(str(modeling_pilot.__file__), folder / "modeling_pilot.py")


def export_lora(model: PilotModel, folder: Path, *, base: str) -> None:
    """Write Θ_l as peft does, for a `PeftModel` around the whole base model.

    What exact aggregation has added to the base is written with it, as more columns and rows of
    its factors: a LoRA of a higher rank and of the same scale, α / r.
    """
    lora, state = model.config.lora, model.state("lora")
    if residual := model.state("residual"):
        state = joined(state, residual)
    rank = len(next(tensor for name, tensor in state.items() if name.endswith("lora_A")))
    targets = "|".join(map(re.escape, lora.targets))
    peft.LoraConfig(
        r=rank,
        lora_alpha=lora.alpha * (rank / lora.rank),
        lora_dropout=lora.dropout,
        # By pattern: the vision tower has layers of the same names.
        target_modules=rf"model\.language_model\..*\.({targets})",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {
        f"base_model.model.model.language_model.{name}.weight": tensor
        for name, tensor in state.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _connector_tensors(model: PilotModel, *, moa: bool, client_adapter: bool) -> State:
    """Return the connector's tensors, named as in the standalone `Connector`."""
    own = f"task_adapters.{model.own_task}" if moa else "task_adapter"
    tensors: State = {}
    for group, prefix in _CONNECTOR_GROUPS.items():
        if group == "client_adapter" and not client_adapter:
            continue
        for name, tensor in model.state(group).items():
            tensors[f"{own if prefix == 'own' else prefix}.{name.replace('/', '.')}"] = tensor
    return tensors


def _base(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Describe the base model; copy it if it cannot be had anywhere else."""
    shipped = checkpoint_path(config.path)
    included = shipped != config.path
    if included:
        ignored = shutil.ignore_patterns("bundle.json")
        shutil.copytree(shipped, folder / "base", ignore=ignored)
    return {
        "path": config.path,
        "revision": config.revision,
        "dtype": config.dtype,
        "included": included,
        "quantization": config.quantization,
    }
