"""The one base model that a process keeps from turn to turn, and from run to run.

What a federation starts from, read without loading the base model.

The server needs the pretrained projector (every task adapter's start) and one LoRA that all
clients share. Shapes come from the checkpoint's configuration on the meta device, the
projector's few tensors from its safetensors files; the base itself stays on disk.

A base model's weights by a sample: two checkpoints are told apart without reading gigabytes.

Of every tensor the first and the last row are read, of the projector, from which every task adapter
starts, all. The order, the names and the files of the tensors do not matter: versions of
transformers write them differently. Tensors that are not floating-point numbers, such as position
ids, are left out, as newer versions do not write them; equal tensors count once, as tied
ones are written once or twice. Other values or another precision are another base.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from pilot_flwr.algorithm.server_state import InitialState, draw_lora
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.model.base import empty_base, load_base, read_config
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import State

_WARM: dict[tuple[str, str, str], PilotModel] = {}


def warm_model(config: ModelConfig, *, reduction: str, device: torch.device) -> PilotModel:
    """Return this process's one base model; it is loaded at the first call and then kept."""
    key = (repr(config), reduction, str(device))
    if key not in _WARM:
        _WARM.clear()  # one base at a time: two may not fit
        _WARM[key] = PilotModel(load_base(config, device), config, reduction=reduction)
    return _WARM[key]


PROJECTOR = "multi_modal_projector."
"""In the names of the projector's tensors, before what they are called in an adapter."""


def initial_state(config: ModelConfig, *, seed: int) -> InitialState:
    """Read the projector and draw Θ_l.

    Parameters
    ----------
    config : ModelConfig
        Base model and LoRA.
    seed : int
        Of the LoRA's A matrices.

    Raises
    ------
    ModelError
        The checkpoint cannot be read or has no projector.
    """
    dtype = getattr(torch, config.wire_dtype)
    lora = draw_lora(_lora_shapes(config), dtype, seed=seed)
    return InitialState(_read_projector(config, dtype), lora)


def _lora_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    base = empty_base(read_config(config))
    with torch.device("meta"):
        model = PilotModel(base, config)
        model.enter_stage1("any")
    return {name: p.shape for name, p in model.groups()["lora"].items()}


def _read_projector(config: ModelConfig, dtype: torch.dtype) -> State:
    state: State = {}
    for file in _weight_files(config):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if PROJECTOR in name:
                    state[name.split(PROJECTOR)[1]] = tensors.get_tensor(name).to(dtype)
    if not state:
        raise ModelError(f"`model.path` is {config.path!r}, which has no tensor `{PROJECTOR}*`.")
    return state


def _weight_files(config: ModelConfig) -> list[str]:
    """Return the safetensors files that hold the projector."""
    folder, revision = checkpoint_path(config.path), config.revision or None
    index = cached_file(
        folder,
        "model.safetensors.index.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    if index is None:
        names = ["model.safetensors"]
    else:
        weights = json.loads(Path(index).read_text())["weight_map"]
        names = sorted({file for name, file in weights.items() if PROJECTOR in name})
    try:
        return [str(cached_file(folder, name, revision=revision)) for name in names]
    except OSError as error:
        raise ModelError(
            f"`model.path` is {config.path!r}, whose weights are missing: {error}"
        ) from error


UNKNOWN = ""
"""Where the weights, or some of them, are not on this machine yet."""

_LENGTH = 12
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class WeightsSample(NamedTuple):
    """Hashes of a base model's weights; `UNKNOWN` for what is not on this machine.

    Attributes
    ----------
    projector : str
        Of all values of the projector.
    whole : str
        Of the first and the last row of every tensor.
    """

    projector: str
    whole: str


def weights_sample(config: ModelConfig) -> WeightsSample:
    """Read a sample of a base model's weights; nothing is downloaded."""
    files, complete = _local_files(config)
    projector: dict[str, str] = {}
    sampled: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                rows = tensors.get_slice(name)
                if not str(rows.get_dtype()).startswith(("F", "BF")):
                    continue
                if PROJECTOR in name:
                    key = name.split(PROJECTOR)[1]
                    projector[key] = _digest(rows, [tensors.get_tensor(name)])
                sampled.add(_digest(rows, [rows[:1], rows[-1:]] if rows.get_shape() else []))
    return WeightsSample(
        _short(json.dumps(projector, sort_keys=True)) if projector else UNKNOWN,
        _short(" ".join(sorted(sampled))) if complete else UNKNOWN,
    )


def _digest(rows: Any, parts: list[torch.Tensor]) -> str:
    found = hashlib.sha256(f"{rows.get_shape()} {rows.get_dtype()}".encode())
    for part in parts:
        found.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def _local_files(config: ModelConfig) -> tuple[list[str], bool]:
    """Return the safetensors files that are on this machine, and whether these are all."""
    index = _local(config, _INDEX)
    if index is None:
        single = _local(config, _SINGLE)
        return ([single], True) if single else ([], False)
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    files = [_local(config, name) for name in names]
    return [file for file in files if file], all(files)


def _local(config: ModelConfig, name: str) -> str | None:
    found: str | None = cached_file(
        checkpoint_path(config.path),
        name,
        revision=config.revision or None,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found
