"""Verify that server and client agree: app version, settings and base model, as short hashes.

A client with other code, settings or weights would train another model, or send tensors of the same
shape with another meaning. Every reply to the roster query carries the client's hashes, and the
server compares them with its own. Settings that belong to a site (path of its base model,
micro-batch) are excluded. To compare more, add a row to `NAMES` and its value to `identity_of`; to
exclude a setting, add it to `SERVER_ONLY`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pilot_flwr import __version__
from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.formatting import plain
from pilot_flwr.model.architectures import read_config, remembered, spec_of
from pilot_flwr.model.checkpoints import UNKNOWN, weights_sample
from pilot_flwr.model.shapes import layout_of
from pilot_flwr.run.provenance import code_hash, digest

NAMES = {
    "app": "app version",
    "settings": "settings",
    "base.config": "base model's configuration",
    "base.processor": "base model's image processor",
    "base.layout": "layout of trained and sent tensors",
    "base.projector": "base model's projector",
    "base.weights": "base model's weights (sample)",
}
"""Compared values, and their names in errors."""

SERVER_ONLY = ("name", "strategy", "simulation", "run", "resume")
"""Settings that no client uses, but for `CLIENT_STRATEGY` in `strategy`."""

CLIENT_STRATEGY = ("sharing", "trained_by")
_KNOWN: dict[str, dict[str, str]] = {}

_SUBCONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "vocab_size",
    "rms_norm_eps",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "depth",
    "num_heads",
    "out_hidden_size",
    "spatial_merge_size",
    "window_size",
    "fullatt_block_indexes",
    "deepstack_visual_indexes",
    "temporal_patch_size",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
)

_CONFIG_FIELDS = (
    "model_type",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "multimodal_projector_bias",
    "downsample_ratio",
    "scale_factor",
    "mm_tokens_per_image",
    "image_grid_pinpoints",
    "vision_aspect_ratio",
)


_WITHOUT_EFFECT = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "label_names")
"""Settings of a tower of any class that do not change its features."""


def identity_of(config: PilotConfig) -> dict[str, str]:
    """Return the hashes of this process, server or client, by the keys of `NAMES`."""
    sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
    return {
        "app": f"{__version__} (code {code_hash()})",
        "settings": digest(common_settings(config)),
        **_base(config.model, tuple(config.data.tasks), sharing, config.strategy.stages),
    }


def differences(client: Mapping[str, str], server: Mapping[str, str]) -> list[str]:
    """List the values of `NAMES` that differ between client and server."""
    found = []
    for key, name in NAMES.items():
        theirs, ours = client.get(key), server[key]
        if theirs is None:
            found.append(f"{name}: missing there, {ours} here")
        elif theirs != ours and UNKNOWN not in (theirs, ours):
            found.append(f"{name}: {plain(theirs)[:60]} there, {ours} here")
    return found


def common_settings(config: PilotConfig) -> dict[str, Any]:
    """Return the settings that clients use, without those that a site sets itself.

    A site's ``micro-batch`` may differ, the number of examples in an optimizer step may not; its
    feature cache may have another limit.
    """
    settings = asdict(config)
    common = {key: value for key, value in settings.items() if key not in SERVER_ONLY}
    common["shared"] = {key: settings["strategy"][key] for key in CLIENT_STRATEGY}
    train = common["train"]
    train["examples_per_step"] = train.pop("batch_size") * train.pop("accumulation_steps")
    del common["evaluation"]["batch_size"], common["model"]["path"]
    del common["model"]["feature_cache"]
    return common


def essential(transformers_config: Any) -> dict[str, Any]:
    """Return the part of a base model's configuration that defines its function.

    The rest depends on the version of transformers and the location of the files.
    """
    parts = {name: getattr(transformers_config, name) for name in ("text_config", "vision_config")}
    found = {name: getattr(transformers_config, name, None) for name in _CONFIG_FIELDS}
    found |= {
        f"{part}.{name}": getattr(subconfig, name, None)
        for part, subconfig in parts.items()
        for name in _SUBCONFIG_FIELDS
    }
    rope = getattr(parts["text_config"], "rope_parameters", None) or {}
    old = getattr(parts["text_config"], "rope_theta", None)
    if spec_of(transformers_config).feature_map:
        found["tower"] = _changed_settings(parts["vision_config"])
    return found | {"rope": dict(rope) or {"rope_theta": old}}


def _changed_settings(tower: Any) -> dict[str, Any]:
    """Return the settings of a tower of any class that are not its class's defaults."""
    defaults = type(tower)().to_dict()
    return {
        name: value
        for name, value in tower.to_dict().items()
        if name not in _WITHOUT_EFFECT and value != defaults.get(name)
    }


def _base(
    model: ModelConfig, tasks: tuple[str, ...], sharing: Sharing, stages: int
) -> dict[str, str]:
    key = f"{model}/{tasks}/{sharing}"
    if key not in _KNOWN:
        _KNOWN.clear()  # a run has one base model
        sample = weights_sample(model)
        # The same call as in `pilot_flwr.client.preflight`, so that it is computed once.
        layout = layout_of(model, tasks, sharing, stages=stages)
        _KNOWN[key] = {
            "base.config": digest(
                remembered("essential", model, (), lambda: essential(read_config(model)))
            ),
            "base.processor": _processor(model),
            "base.layout": digest([model.wire_dtype, layout.sent]),
            "base.projector": sample.projector,
            "base.weights": sample.whole,
        }
    return _KNOWN[key]


def _processor(model: ModelConfig) -> str:
    """Return a hash of `probe_images`, `UNKNOWN` if the image processor's files are missing."""

    def probe() -> list[Any]:
        from pilot_flwr.model.processor import probe_images  # imports torch

        return probe_images(model)

    try:
        return digest(remembered("processor", model, (), probe))
    except (OSError, ValueError):
        return UNKNOWN
