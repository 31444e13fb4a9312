"""Write overrides of the configuration, and the texts that Flower's command line takes.

Three syntaxes are nested: Hydra's overrides, shell quoting (the app splits the overrides with
`shlex`) and TOML as Flower's command line reads it.

Flower carries the configuration as one string of overrides, and a client must not read the
server's files; so `expand` converts a user's own federation, ``data=my-federation.yaml``, into
overrides. Its keys are those of `pilot_flwr.config.data.DataConfig`.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from pilot_flwr.config.data import ALL, DataConfig
from pilot_flwr.config.loading import MISSING, check_yaml, hydra_text, load_config
from pilot_flwr.config.rules import expanded
from pilot_flwr.config.schema import PilotConfig, SimulationConfig
from pilot_flwr.errors import ConfigError


def expand(overrides: Sequence[str]) -> list[str]:
    """Replace every ``data=FILE.yaml`` among Hydra overrides by the file's settings.

    Other overrides keep their place, so that a later one still changes a setting of the file. By
    default the source is ``llava`` and clients use all of their examples. The file's `folder` is
    relative to the file.

    Raises
    ------
    ConfigError
        A file cannot be read or does not describe a federation; names the file and the key.
    """
    result: list[str] = []
    for override in overrides:
        value = override.removeprefix("data=").strip("'\"")
        is_file = "/" in value or value.endswith((".yaml", ".yml"))
        from_file = override.startswith("data=") and is_file
        result += _file_overrides(value) if from_file else [override]
    return result


def _file_overrides(name: str) -> list[str]:
    path = Path(os.path.abspath(expanded("data", name)))
    settings = _read_settings(path, name)
    try:
        folder = settings.pop("folder", ".")
        if not isinstance(folder, str) or not folder.strip():
            found = "empty" if folder in (None, "") else repr(folder)
            raise ConfigError(f"`folder` is {found} but must be a folder; `.` is the file's own.")
        folder = Path(os.path.abspath(path.parent / expanded("folder", folder)))
        overrides = ["data=digits"]  # Hydra needs a choice; the file's settings replace it
        for key, value in settings.items():
            # `+`, as Hydra otherwise refuses a task's name as an unknown key.
            add = "+" if key == "files" else ""
            overrides.append(f"{add}data.{key}={_hydra_value(value, key)}")
        overrides.append(path_override("data.folder", folder))
        load_config(shlex.join(overrides))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return overrides


def _read_settings(path: Path, name: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"`data` is {name!r}, which cannot be read: {error.strerror}.") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: the 31st of June
        raise ConfigError(f"`data` is {name!r}, which is not YAML: {error}") from None
    if not isinstance(content, dict) or "tasks" not in content:
        raise ConfigError(f"{name} must have at least `tasks`; see docs/reference/data.md.")
    keys = [field.name for field in fields(DataConfig)]
    for key in content:
        if key not in keys:
            raise ConfigError(f"{name}: `{key}` must be one of {', '.join(keys)}.")
    return {"source": "llava", "train_examples": ALL, "test_examples": ALL} | content


def _hydra_value(value: Any, key: str) -> str:
    """Return a YAML value in Hydra's override grammar."""
    if isinstance(value, dict):
        for inner in value:
            if not isinstance(inner, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", inner):
                raise ConfigError(
                    f"{inner!r} in `{key}` must be letters, digits, '_' and '-' only."
                )
        pairs = [f"{k}:{_hydra_value(v, f'{key}.{k}')}" for k, v in value.items()]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_hydra_value(item, key) for item in value) + "]"
    if value is None:
        raise ConfigError(f"`{key}` is empty; give it a value, or leave it out.")
    if value == MISSING:
        raise ConfigError(f"`{key}` is {value!r}, which stands for a missing value here.")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    return hydra_text(str(value))


def with_folder(config: PilotConfig, overrides: Sequence[str]) -> tuple[PilotConfig, list[str]]:
    """Return configuration and overrides with `data.folder` made absolute.

    Clients run in other working directories, where a relative folder would be another one.
    """
    data = config.data
    if data.source != "llava":
        return config, list(overrides)
    folder = os.path.abspath(expanded("data.folder", data.folder))
    changed = [*overrides, path_override("data.folder", Path(folder))]
    return replace(config, data=replace(data, folder=folder)), changed


def default_run_folder(name: str, now: datetime) -> Path:
    """Return ``outputs/<name>-<YYYYmmdd-HHMMSS>``, relative to the working directory."""
    return Path("outputs") / f"{name}-{now:%Y%m%d-%H%M%S}"


def run_folder(configured: str, name: str, now: datetime) -> Path:
    """Return the absolute path of `run.folder`, or of the default folder if it is empty.

    Raises
    ------
    ConfigError
        The folder is not empty.
    """
    path = expanded("run.folder", configured) if configured else default_run_folder(name, now)
    folder = Path(os.path.abspath(path))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`run.folder` is {str(folder)!r} but must be a new or empty folder.")
    return folder


def path_override(key: str, path: Path) -> str:
    """Return the Hydra override that sets `key` to a path with any characters."""
    plain = re.fullmatch(r"[A-Za-z0-9_./-]+", str(path))
    return f"{key}={path if plain else hydra_text(str(path))}"


def toml_string(text: str) -> str:
    r"""Return `text` as a TOML string that Flower's command line reads as one value.

    Flower splits ``key="value"`` pairs with a regular expression in which a value ends at the next
    double quote, escaped or not. So a double quote is written ``\u0022``.
    """
    pieces = (json.dumps(piece, ensure_ascii=False)[1:-1] for piece in text.split('"'))
    return '"' + r"\u0022".join(pieces).replace("\x7f", r"\u007f") + '"'


def federation_config(num_clients: int, simulation: SimulationConfig) -> str:
    """Return the value of ``flwr run --federation-config``.

    By default all CPU cores that this process may use, all GPUs that torch sees, and one GPU per
    process of a client if there is any.

    Raises
    ------
    ConfigError
        Not even one client fits: Flower would call that run completed.
    """
    cpus = simulation.cpus or len(os.sched_getaffinity(0))
    gpus = _visible_gpus() if simulation.gpus == -1 else simulation.gpus
    client_gpus = gpus_per_client(simulation, gpus)
    for name, each, all_of in (
        ("cpus", simulation.client_cpus, cpus),
        ("gpus", client_gpus, gpus),
    ):
        if each > all_of:
            raise ConfigError(
                f"`simulation.client_{name}` is {each:g} but must be at most "
                f"`simulation.{name}`, here {all_of}."
            )
    values = {
        "num-supernodes": num_clients,
        "client-resources-num-cpus": simulation.client_cpus,
        "client-resources-num-gpus": float(client_gpus),
        "init-args-num-cpus": cpus,
        "init-args-num-gpus": gpus,
    }
    return " ".join(f"{key}={value!r}" for key, value in values.items())


def gpus_per_client(simulation: SimulationConfig, gpus: float) -> float:
    """Return one client's GPUs on machines that have up to `gpus` of them."""
    if simulation.client_gpus != -1:
        return simulation.client_gpus
    return float(simulation.client_processes) if gpus >= 1 else 0.0


def check_gpus(simulation: SimulationConfig) -> None:
    """Raise `ConfigError` for more GPUs than torch sees; their clients would run on the CPU.

    Not part of `federation_config`, which a client also calls: Ray may hide the GPUs from it.
    """
    if simulation.gpus > 0 and simulation.gpus > (seen := _visible_gpus()):
        raise ConfigError(
            f"`simulation.gpus` is {simulation.gpus} but must be at most {seen}, the number of "
            "GPUs that torch sees."
        )


def _visible_gpus() -> int:
    import torch  # takes seconds, and only a run needs it

    return torch.cuda.device_count()
