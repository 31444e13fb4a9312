"""Load a base model: weights, processor, collator, and the initial state of a federation.

The server needs only the pretrained projector (every task adapter's start) and one initial LoRA.
Shapes come from the checkpoint's configuration and the projector from its safetensors files; the
rest of the base stays on disk. A client loads the base once per process.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from pilot_flwr.algorithm.server_state import InitialState, draw_lora
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import read_config, spec_of
from pilot_flwr.model.checkpoints import (
    files_stamp,
    locate,
    projector_files,
    projector_key,
    unfit_template,
)
from pilot_flwr.model.shapes import lora_shapes
from pilot_flwr.protocol import State

if TYPE_CHECKING:
    import torch

    from pilot_flwr.data.collator import Collator
    from pilot_flwr.model.pilot_model import PilotModel
    from pilot_flwr.model.processor import Processor

_LOADED: dict[tuple[str, ...], PilotModel] = {}


def loaded_model(
    config: ModelConfig, *, reduction: str, balance_reduction: str = "pooled", device: torch.device
) -> PilotModel:
    """Return this process's only model; load it at the first call and when its files change."""
    from pilot_flwr.model.pilot_model import PilotModel

    stamp = repr(files_stamp(config.path))
    key = (repr(config), reduction, balance_reduction, str(device), stamp)
    if key not in _LOADED:
        if _LOADED:  # memory may not hold two bases; features belong to one
            from pilot_flwr.model.feature_cache import forget_features

            _LOADED.clear()
            forget_features()
        base = load_base(config, device)
        reductions = {"reduction": reduction, "balance_reduction": balance_reduction}
        _LOADED[key] = PilotModel(base, config, **reductions)
    return _LOADED[key]


def is_loaded() -> bool:
    """Return whether this process has loaded a model."""
    return bool(_LOADED)


def load_base(config: ModelConfig, device: torch.device) -> Any:
    """Load a base model with `from_pretrained` straight to `device` and check every key.

    With `model.device_map=auto` its layers are spread over all GPUs, unless `device` names one.
    """
    import torch
    import transformers

    read = read_config(config)
    weights = getattr(read, "transformers_weights", None) or ".safetensors"
    if not weights.endswith((".safetensors", ".safetensors.index.json")):
        # They would take precedence over `use_safetensors`.
        raise ModelError(
            f"`model.path` is {config.path!r}, whose config.json names {weights!r} as "
            "`transformers_weights`, but weights are read from safetensors files only."
        )
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.quantization == "4bit":
        options["quantization_config"] = _four_bit(read, options["dtype"])
    if device.type != "cpu":
        spread = config.device_map == "auto" and device.index is None
        options["device_map"] = "auto" if spread else {"": device}
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(  # nosec B615
            attn_implementation={"text_config": config.attention},
            output_loading_info=True,
            use_safetensors=True,
            **options,
            **_source(config),
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"`model.path` is {config.path!r}, which cannot be loaded: {error}"
        ) from error
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        raise ModelError(f"`model.path` is {config.path!r}, whose keys do not fit: {problems}")
    return model


def load_processor(path: str, revision: str = "") -> Processor:
    """Return the checkpoint's processor: tokenizer, chat template, image processor."""
    return _load_processor(path, revision, files_stamp(path))


@functools.lru_cache(maxsize=1)
def _load_processor(path: str, revision: str, _stamp: object) -> Processor:
    from pilot_flwr.model.processor import Processor, processor_class

    config = ModelConfig(path=path, revision=revision)
    read = read_config(config)
    try:
        family = processor_class(read)
        loaded = family.from_pretrained(**_source(config), **family.without)  # nosec B615
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"The processor of {path!r} cannot be loaded: {error}") from error
    processor = Processor(loaded, spec_of(read))
    _check_template(path, processor)
    return processor


def _check_template(path: str, processor: Processor) -> None:
    """Raise `ModelError` unless the chat template renders an image and its question."""
    content = [{"type": "image"}, {"type": "text", "text": "question"}]
    defect = "has no chat template"
    if processor.original.chat_template:
        try:
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            defect = f"has a chat template that cannot render an image and a text: {error}"
        else:
            if text.count(processor.image_token) == 1 and "question" in text:
                return
            defect = f"has a chat template that renders no {processor.image_token!r} for an image"
    raise unfit_template(path, defect)


def make_collator(
    config: ModelConfig, processor: Processor, *, max_length: int, cut: bool = False
) -> Collator:
    """Return the collator of a base model."""
    from pilot_flwr.data.collator import Collator

    return Collator(processor, max_length=max_length, system_prompt=config.system_prompt, cut=cut)


def initial_state(config: ModelConfig, *, seed: int) -> InitialState:
    """Read the base model's projector, and draw the A matrices of Θ_l from `seed`."""
    import torch

    dtype = getattr(torch, config.wire_dtype)
    shapes = {n: torch.Size(s) for n, s in lora_shapes(config).items()}
    projector: State = {}
    for file in projector_files(config):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if key := projector_key(name):
                    projector[key] = tensors.get_tensor(name).to(dtype)
    if not projector:
        raise ModelError(f"`model.path` is {config.path!r}, which has no tensor of a projector.")
    return InitialState(projector, draw_lora(shapes, dtype, seed=seed))


def _source(config: ModelConfig) -> dict[str, Any]:
    """Return arguments for `from_pretrained` that never run a checkpoint's code."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": locate(config)}
    source |= {"revision": config.revision} if config.revision else {}
    return source | {"trust_remote_code": False}


def _four_bit(base: Any, dtype: torch.dtype) -> Any:
    """Return NF4 settings with double quantization for the language model's layers."""
    import transformers

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "`model.quantization` is '4bit', which needs bitsandbytes: "
            "pip install 'pilot-flwr[quantization]'."
        )
    s = spec_of(base)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[f"model.{s.tower}", f"model.{s.projector}", "lm_head"],
    )
