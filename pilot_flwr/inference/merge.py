"""Merge LoRA and adapters of a stage-1 model into one checkpoint.

A LoRA is merged as in peft, ``W + α/r B A``. An inert ψ_s, as in a consensus model, is left out.
Two adapters of one linear layer are added. The sum of two of LLaVA's, which have two layers of
width C, is exactly one with a hidden layer of width 2C::

    W_1 = [W_1t; W_1s]   b_1 = [b_1t; b_1s]   W_2 = [W_2t  W_2s]   b_2 = b_2t + b_2s

transformers' projector classes tie the hidden width to C, ``text_config.hidden_size``. If C hidden
units are enough (`fold`), the result is a plain checkpoint; else it carries a subclass with a wider
layer (`pilot_flwr.inference.modeling_wide`). No other class of projector can hold the sum of two.
Stage 2 cannot be merged: its router weighs the experts for every token, which no single projector
computes.
"""

import json
import shutil
from pathlib import Path

import peft
import torch
from torch import nn
from transformers.utils import cached_file

from pilot_flwr.algorithm.connector import TaskClientConnector
from pilot_flwr.client.private_state import PrivateState
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.inference import modeling_wide
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.model.pilot_model import PilotModel, empty_base
from pilot_flwr.protocol import State

_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def check_mergeable(private: PrivateState | None) -> None:
    """Raise `ModelError` unless a model with this private state is of stage 1."""
    if private is not None and private.stage == 2:
        raise ModelError(
            "`--merge` needs a model of stage 1, but this client's is of stage 2 (CT-MoA), whose "
            f"router mixes the adapters of {len(private.tasks)} tasks for every visual token: no "
            "single projector computes that. Export without `--merge`, or take the consensus "
            "model with `--task`."
        )


def merge_model(model: PilotModel, folder: Path, *, end_token_ids: list[int]) -> int:
    """Write an equivalent Hugging Face checkpoint; return the width of a wider projector's layer.

    The width is 0 for a plain checkpoint; else it needs `modeling_wide`. The stage-1 model is
    modified and must not be used again. Raises `ModelError` if the projector's class cannot hold
    the sum of ψ_t and ψ_s.
    """
    connector = model.connector
    assert isinstance(connector, TaskClientConnector), "see check_mergeable"
    assert model.config.quantization == "none"
    base, place = model.base, model.spec.projector
    projector = empty_base(base.config).model.get_submodule(place).to_empty(device="cpu")
    merged = merge_adapters(connector.task_adapter, connector.client_adapter, model.spec.last)
    hidden = 0
    if (
        "linear_1.weight" in merged
        and len(merged["linear_1.weight"]) > projector.linear_1.out_features
    ):
        hidden = len(merged["linear_1.weight"])
        modeling_wide.widen(projector, hidden)
    projector.load_state_dict(merged)
    merge_lora(model.decoder)
    base.model.set_submodule(place, projector.to(base.dtype))
    base.generation_config.eos_token_id = end_token_ids
    # transformers restores the parameter names of older versions for its own classes only.
    base.save_pretrained(folder, save_original_format=not hidden)
    _copy_processor(model.config, folder)
    if hidden:
        _add_class(folder, type(base).__name__, hidden)
    return hidden


@torch.no_grad()
def merge_adapters(first: nn.Module, second: nn.Module | None, last: str) -> State:
    """Return the tensors of one projector that computes ``first + second``.

    `last` names their last layer. LLaVA's projector may become wider.
    """
    one = dict(first.state_dict())
    if second is None:
        return one
    two = dict(second.state_dict())
    final = {name for name in two if f"{name}.".startswith(f"{last}.")}
    if not any(two[name].any() for name in final):
        return one
    if final == two.keys():  # one linear layer
        return {name: tensor + two[name] for name, tensor in one.items()}
    if {name.partition(".")[0] for name in one} == {"linear_1", "linear_2"}:
        return fold(sum_of_adapters(first, second), len(one["linear_2.weight"]))
    raise ModelError(
        f"`--merge` cannot be used for this client: a projector of class {type(first).__name__} "
        "cannot hold the sum of the task adapter and the client adapter. Export without "
        "`--merge`, or take the consensus model with `--task`."
    )


def merge_lora(language_model: nn.Module) -> None:
    """Merge Θ_l into the weights, in place, and remove peft's layers."""
    for name, layer in list(language_model.named_modules()):
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(language_model.get_submodule(parent), child, layer.get_base_layer())


@torch.no_grad()
def sum_of_adapters(first: nn.Module, second: nn.Module) -> State:
    """Return the tensors of ``first + second`` as one adapter of hidden width 2C, exactly."""
    one, two = first.state_dict(), second.state_dict()
    merged = {
        "linear_1.weight": torch.cat([one["linear_1.weight"], two["linear_1.weight"]]),
        "linear_2.weight": torch.cat([one["linear_2.weight"], two["linear_2.weight"]], dim=1),
    }
    if "linear_1.bias" in one:
        merged["linear_1.bias"] = torch.cat([one["linear_1.bias"], two["linear_1.bias"]])
        merged["linear_2.bias"] = one["linear_2.bias"] + two["linear_2.bias"]
    return merged


def fold(adapter: State, width: int) -> State:
    """Return an equal adapter with a hidden layer of `width`, or `adapter` if that is too narrow.

    Units with zero outgoing weights are dropped, units with equal incoming weights are joined, and
    zeros fill up the rest.
    """
    inner, outer = adapter["linear_1.weight"], adapter["linear_2.weight"]
    bias = adapter.get("linear_1.bias")
    rows = inner if bias is None else torch.cat([inner, bias[:, None]], dim=1)
    used = outer.abs().amax(0) > 0
    kept, places = torch.unique(rows[used], dim=0, return_inverse=True)
    if len(kept) > width:
        return adapter
    kept = nn.functional.pad(kept, (0, 0, 0, width - len(kept)))
    folded = {
        "linear_1.weight": kept[:, : inner.shape[1]],
        "linear_2.weight": torch.zeros_like(outer[:, :width]).index_add_(1, places, outer[:, used]),
    }
    if bias is not None:
        folded["linear_1.bias"] = kept[:, -1]
        folded["linear_2.bias"] = adapter["linear_2.bias"]
    return folded


def _copy_processor(config: ModelConfig, folder: Path) -> None:
    """Copy the base's tokenizer, chat template and image processor unchanged."""
    for name in _PROCESSOR_FILES:
        file = cached_file(
            checkpoint_path(config.path),
            name,
            revision=config.revision or None,
            _raise_exceptions_for_missing_entries=False,
        )
        if file is not None:
            shutil.copyfile(file, folder / name)


def _add_class(folder: Path, architecture: str, hidden: int) -> None:
    """Copy the class with the wider projector, and register it in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    name = modeling_wide.CLASSES[architecture]
    config["architectures"] = [name]
    config["projector_hidden_size"] = hidden
    config["auto_map"] = {"AutoModelForImageTextToText": f"modeling_wide.{name}"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(str(modeling_wide.__file__), folder / "modeling_wide.py")
