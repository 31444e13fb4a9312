"""The base model as its checkpoint has it: configuration, weights, processor.

A checkpoint is a name that ships with the package, a local folder or a Hugging Face id. What a
model is made of is read from its configuration alone, on the meta device (`empty_base`), so
that a question about it does not load it.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from pilot_flwr.config.model import ModelConfig
from pilot_flwr.data.collator import Collator
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import spec_of
from pilot_flwr.model.checkpoints import checkpoint_path, reference_config

_NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def read_config(config: ModelConfig) -> Any:
    """Read the transformers configuration of a checkpoint.

    Raises
    ------
    ModelError
        It cannot be read, or its architecture is not supported.
    """
    try:
        return _supported(**_source(config))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`model.path` is {config.path!r}, which cannot be read: {error}"
        ) from error


def known_config(config: ModelConfig) -> Any:
    """Read the configuration without the network: the checkpoint's, else the one we ship.

    Raises
    ------
    ModelError
        The checkpoint is not on this machine and its configuration is not shipped.
    """
    reference = reference_config(config.path)
    if reference is None:
        return read_config(config)
    try:
        return _supported(**_source(config), local_files_only=True)
    except (OSError, ValueError):
        return _supported(reference, trust_remote_code=False)


def _supported(*place: str, **source: Any) -> Any:
    """Read a transformers configuration, of an architecture that has a row."""
    read = transformers.AutoConfig.from_pretrained(*place, **source)  # nosec B615  # has revision
    spec_of(read)
    return read


def load_base(config: ModelConfig, device: torch.device) -> Any:
    """Load a base model with `from_pretrained`, every key checked.

    Parameters
    ----------
    config : ModelConfig
        Checkpoint, precision, quantization, attention.
    device : torch.device
        Where its weights go, straight from the file.

    Raises
    ------
    ModelError
        It cannot be loaded, or keys are missing, unexpected or mismatched.
    """
    read = read_config(config)
    weights = getattr(read, "transformers_weights", None) or ".safetensors"
    if not weights.endswith((".safetensors", ".safetensors.index.json")):
        # It would come before `use_safetensors`.
        raise ModelError(
            f"`model.path` is {config.path!r}, whose config.json names {weights!r} as "
            "`transformers_weights`, but weights are read from safetensors files only."
        )
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.quantization == "4bit":
        options["quantization_config"] = _four_bit(options["dtype"])
    if device.type != "cpu":
        options["device_map"] = {"": device}
    try:
        model, info = getattr(transformers, spec_of(read).model_class).from_pretrained(
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


def empty_base(transformers_config: Any) -> Any:
    """Return the model without weights, on the meta device."""
    with torch.device("meta"):
        model_class = getattr(transformers, spec_of(transformers_config).model_class)
        return model_class(transformers_config)


@functools.lru_cache(maxsize=1)
def load_processor(path: str, revision: str = "") -> Any:
    """Load the checkpoint's processor: tokenizer, chat template, image processor."""
    config = ModelConfig(path=path, revision=revision)
    try:
        if spec_of(read_config(config)).has_video:
            return _image_processor_parts(config)
        source = _source(config)
        return transformers.AutoProcessor.from_pretrained(**source)  # nosec B615  # has revision
    except (OSError, ValueError) as error:
        raise ModelError(f"The processor of {path!r} cannot be loaded: {error}") from error


@dataclass(frozen=True)
class ImageTextProcessor:
    """The parts of a processor that treats videos too, without that part."""

    tokenizer: Any
    image_processor: Any
    image_token: str
    chat_template: str

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """Render a conversation, as transformers' processors do."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, **options
        )


def _image_processor_parts(config: ModelConfig) -> ImageTextProcessor:
    source = _source(config)
    path = source.pop("pretrained_model_name_or_path")
    values, _ = transformers.ProcessorMixin.get_processor_dict(path, **source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **source)  # nosec B615  # as above
    images = transformers.AutoImageProcessor.from_pretrained(path, **source)  # nosec B615
    return ImageTextProcessor(
        tokenizer=tokenizer,
        image_processor=images,
        image_token=values.get("image_token", "<image>"),
        chat_template=values["chat_template"],
    )


def make_collator(
    config: ModelConfig, processor: Any, transformers_config: Any, *, max_length: int
) -> Collator:
    """Return the collator of a base model."""
    spec = spec_of(transformers_config)
    return Collator(
        processor,
        count_tokens=lambda sizes: spec.count_tokens(transformers_config, sizes),
        max_length=max_length,
        system_prompt=config.system_prompt,
    )


def _source(config: ModelConfig) -> dict[str, Any]:
    """Return what `from_pretrained` has to know to find the checkpoint, and to run none of it.

    Code in a checkpoint is refused, not asked about, and weights that are not safetensors
    (`use_safetensors` in `load_base`) are not unpickled.

    Raises
    ------
    ModelError
        The path can only be a folder's, and there is none.
    """
    if config.path.startswith(("/", ".", "~")) and not os.path.isdir(config.path):
        raise ModelError(f"`model.path` is {config.path!r}, but there is no such folder.")
    source = {"pretrained_model_name_or_path": checkpoint_path(config.path)}
    source |= {"revision": config.revision} if config.revision else {}
    return source | {"trust_remote_code": False}


def _four_bit(dtype: torch.dtype) -> Any:
    """NF4 with double quantization for the language model's layers."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "`model.quantization` is '4bit', which needs bitsandbytes: "
            "pip install 'pilot-flwr[quantization]'."
        )
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )
