"""What server and clients must have in common: app, settings and base model, as short hashes.

A client with another version of any of them would train another model, or send tensors that fit
and mean something else. So every answer to the roster query has the client's hashes, and the server
compares them with its own. What belongs to a site alone (where its base model is, how many
examples it computes at once) is in none of them. To have more compared, add a row to `NAMES` and
its value to `identity_of`; to leave a setting out, add it to `SERVERS_OWN`.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pilot_flwr import __version__
from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.config.loading import config_folder
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.formatting import plain
from pilot_flwr.model.base import read_config
from pilot_flwr.model.loading import UNKNOWN, weights_sample
from pilot_flwr.model.resource_plan import layout_of

NAMES = {
    "app": "app version",
    "settings": "settings",
    "base.config": "base model's configuration",
    "base.layout": "layout of what is trained and sent",
    "base.projector": "base model's projector",
    "base.weights": "base model's weights (sample)",
}
"""What is compared, and what people call it."""

SERVERS_OWN = ("name", "strategy", "simulation", "run", "resume")
"""Settings that no client uses, but for `CLIENTS_PART` of the strategy's."""

CLIENTS_PART = ("sharing", "trained_by")
_KNOWN: dict[str, dict[str, str]] = {}

_PART = (
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
)

_WHOLE = (
    "model_type",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "multimodal_projector_bias",
)


def identity_of(config: PilotConfig) -> dict[str, str]:
    """Return what this process is, by the keys of `NAMES`.

    Parameters
    ----------
    config : PilotConfig
        The run's, on the server or as it holds at a site.

    Raises
    ------
    ModelError
        The base model's configuration cannot be read.
    """
    sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
    return {
        "app": f"{__version__} (code {code_hash()})",
        "settings": digest(common_settings(config)),
        **_base(config.model, tuple(config.data.tasks), sharing, config.strategy.stages),
    }


def differences(client: Mapping[str, str], server: Mapping[str, str]) -> list[str]:
    """Say in which rows of `NAMES` a client is another than the server, with both values."""
    found = []
    for key, name in NAMES.items():
        theirs, ours = client.get(key), server[key]
        if theirs is None:
            found.append(f"{name}: not said, here {ours}")
        elif theirs != ours and UNKNOWN not in (theirs, ours):
            found.append(f"{name}: {plain(theirs)[:60]} there, {ours} here")
    return found


@functools.lru_cache(maxsize=1)
def code_hash() -> str:
    """Return a hash of this package's code and of its choices in ``conf/``."""
    package = Path(__file__).resolve().parent.parent
    files = {path.relative_to(package): path for path in package.rglob("*.py")}
    files |= {
        Path("conf") / path.relative_to(config_folder()): path
        for path in config_folder().rglob("*.yaml")
    }
    lines = (f"{name.as_posix()} {digest(files[name].read_text('utf-8'))}" for name in files)
    return digest(sorted(lines))


def digest(value: Any) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def common_settings(config: PilotConfig) -> dict[str, Any]:
    """Return the settings that clients use, without what a site has of its own.

    An optimizer step's examples stay: a site's ``micro-batch`` splits them another way.
    """
    settings = asdict(config)
    common = {key: value for key, value in settings.items() if key not in SERVERS_OWN}
    common["shared"] = {key: settings["strategy"][key] for key in CLIENTS_PART}
    train = common["train"]
    train["examples_per_step"] = train.pop("batch_size") * train.pop("accumulation_steps")
    del common["evaluation"]["batch_size"], common["model"]["path"]
    return common


def essential(transformers_config: Any) -> dict[str, Any]:
    """Return what makes a base model what it is, of its configuration.

    Not all of it: what a version of transformers adds, and where it was read, may differ.
    """
    parts = {name: getattr(transformers_config, name) for name in ("text_config", "vision_config")}
    found = {name: getattr(transformers_config, name, None) for name in _WHOLE}
    found |= {
        f"{part}.{name}": getattr(read, name, None)
        for part, read in parts.items()
        for name in _PART
    }
    rope = getattr(parts["text_config"], "rope_parameters", None) or {}
    old = getattr(parts["text_config"], "rope_theta", None)
    return found | {"rope_theta": rope.get("rope_theta", old)}


def _base(
    model: ModelConfig, tasks: tuple[str, ...], sharing: Sharing, stages: int
) -> dict[str, str]:
    key = f"{model}/{tasks}/{sharing}"
    if key not in _KNOWN:
        _KNOWN.clear()  # one run, one base
        sample = weights_sample(model)
        # Of all stages, as a client's `pilot_flwr.client.preflight` asks for it too.
        layout = layout_of(model, tasks, sharing, stages=stages)
        _KNOWN[key] = {
            "base.config": digest(essential(read_config(model))),
            "base.layout": digest([model.wire_dtype, layout.sent]),
            "base.projector": sample.projector,
            "base.weights": sample.whole,
        }
    return _KNOWN[key]
