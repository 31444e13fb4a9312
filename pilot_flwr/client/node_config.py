"""What a node's configuration says: the words of ``--node-config``, read and checked by themselves.

A real site's node config is the only place that names its data, folders and device. It is checked
here as far as that goes without the run's settings and without the disk; `pilot_flwr.client.site`
joins it with the run's settings, `pilot_flwr.client.readiness` tries what it names. To add a key,
add a row to `KEYS`, a field to `NodeSettings` and a row to the table in docs/sites.md.
"""

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pilot_flwr.checks import at_least, check_name, expanded, positive, share
from pilot_flwr.client.privacy_demands import PrivacyDemands
from pilot_flwr.errors import ConfigError

NodeConfig = Mapping[str, bool | float | int | str]
"""As Flower's context carries it."""

KEYS = {
    "client-id": "name of this site, letters, digits, '_' and '-'",
    "task": "one of the run's `data.tasks`",
    "train-file": "training data, LLaVA JSON or JSONL",
    "test-file": "test data, LLaVA JSON or JSONL",
    "image-folder": "folder of the images",
    "state-folder": "folder for what never leaves the site",
    "device": "auto, cpu, cuda or cuda:N",
    "model-path": "folder of the base model",
    "micro-batch": "examples at once in memory",
    "min-noise-multiplier": "least `privacy.noise_multiplier` of a run",
    "max-clip-norm": "largest `privacy.clip_norm` of a run",
    "max-epsilon": "largest ε of all that this site ever uploads",
    "privacy-delta": "the δ of `max-epsilon`",
    "allow-metrics": "true if losses and scores may leave beside private uploads",
}
"""Every key of a real site's node config, and what it is."""

FLOWERS_KEYS = ("partition-id", "num-partitions")
"""What Flower's simulation engine writes into every node config; a real site may have them."""

FILE_SEPARATOR = ";"
"""Between the files of ``train-file`` and of ``test-file``."""


@dataclass(frozen=True)
class NodeSettings:
    """A node config, read; what is not in it is empty, None or 0.

    Attributes
    ----------
    client_id, task : str
        Who the site is. A simulated node has no `client_id`.
    partition_id, num_partitions : int or None
        Flower's own.
    train_files, test_files : tuple of Path
        Absolute.
    image_folder, state_folder, model_path : Path or None
        Absolute.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    micro_batch : int
        Examples at once in memory; 0 for as many as the run says.
    demands : PrivacyDemands
        What it asks of a run's differential privacy.
    """

    client_id: str = ""
    task: str = ""
    partition_id: int | None = None
    num_partitions: int | None = None
    train_files: tuple[Path, ...] = ()
    test_files: tuple[Path, ...] = ()
    image_folder: Path | None = None
    state_folder: Path | None = None
    device: str = "auto"
    model_path: Path | None = None
    micro_batch: int = 0
    demands: PrivacyDemands = PrivacyDemands()


def read_node_config(values: NodeConfig) -> NodeSettings:
    """Read a node config; no file is looked at.

    Parameters
    ----------
    values : mapping
        As Flower's context carries it.

    Raises
    ------
    ConfigError
        An unknown key, or a value of the wrong kind.
    """
    for key in values:
        if key not in KEYS and key not in FLOWERS_KEYS:
            raise _unknown(key)
    settings = NodeSettings(
        client_id=_text(values, "client-id"),
        task=_text(values, "task"),
        partition_id=_whole(values, "partition-id"),
        num_partitions=_whole(values, "num-partitions"),
        train_files=_files(values, "train-file"),
        test_files=_files(values, "test-file"),
        image_folder=_folder(values, "image-folder"),
        state_folder=_folder(values, "state-folder"),
        device=_text(values, "device") or "auto",
        model_path=_folder(values, "model-path"),
        micro_batch=_whole(values, "micro-batch") or 0,
        demands=_demands(values),
    )
    if "client-id" in values:
        check_name("client-id", settings.client_id)
    if "micro-batch" in values:
        at_least("micro-batch", settings.micro_batch, 1)
    return settings


def is_engines(values: NodeConfig) -> bool:
    """Return whether a node config is as Flower's simulation engine makes it."""
    return set(FLOWERS_KEYS) <= values.keys() and "client-id" not in values


def private_paths(values: NodeConfig) -> dict[str, str]:
    """Return what no error may tell the server: this site's paths, and what to write instead.

    Parameters
    ----------
    values : mapping
        The node config, right or wrong. Every value that is a path counts, each file of
        ``train-file`` for itself: as it is written, with ``~`` expanded, and with links resolved.

    Returns
    -------
    dict
        Path → ``<key>``; also the folders that files are in, and the home folder.
    """
    named: dict[str, str] = {}
    for key, value in values.items():
        for name in str(value).split(FILE_SEPARATOR) if isinstance(value, str) else ():
            for form in _forms(name.strip()):
                named[form] = f"<{key}>"
                if key.endswith("-file"):
                    named.setdefault(str(Path(form).parent), f"<folder of {key}>")
    for form in _forms("~"):
        named.setdefault(form, "<home>")
    return {path: key for path, key in named.items() if len(path) > 1}


def find_device(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is a GPU if there is one.

    Raises
    ------
    ConfigError
        There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"`device` is {name!r} but must be auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"`device` is {name!r} but this machine has {torch.cuda.device_count()} GPUs."
        )
    return device


def _unknown(key: str) -> ConfigError:
    near = difflib.get_close_matches(key.lower().replace("_", "-"), KEYS, n=1, cutoff=0.75)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return ConfigError(
        f"`{key}` in the node config is no key of a site.{hint} There are {', '.join(KEYS)}."
    )


def _text(values: NodeConfig, key: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"`{key}` is {value} but must be text in quotes: {KEYS[key]}.")
    return value.strip()


def _whole(values: NodeConfig, key: str) -> int | None:
    value = values.get(key)
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        value = int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"`{key}` is {value!r} but must be a whole number.")
    return value


def _demands(values: NodeConfig) -> PrivacyDemands:
    limits = {
        key: _positive(values, key)
        for key in ("min-noise-multiplier", "max-clip-norm", "max-epsilon", "privacy-delta")
    }
    share("privacy-delta", limits["privacy-delta"] or 0)
    allow = values.get("allow-metrics", False)
    if not isinstance(allow, bool):
        raise ConfigError(f"`allow-metrics` is {allow!r} but must be true or false.")
    return PrivacyDemands(
        min_noise_multiplier=limits["min-noise-multiplier"] or 0.0,
        max_clip_norm=limits["max-clip-norm"] or math.inf,
        max_epsilon=limits["max-epsilon"] or math.inf,
        delta=limits["privacy-delta"] or PrivacyDemands.delta,
        allow_metrics=allow,
    )


def _positive(values: NodeConfig, key: str) -> float | None:
    """Return a number above zero, None if there is no such key."""
    if key not in values:
        return None
    try:
        number = math.nan if isinstance(values[key], bool) else float(values[key])
    except (ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"`{key}` is {values[key]!r} but must be a number: {KEYS[key]}.")
    positive(key, number)
    return number


def _files(values: NodeConfig, key: str) -> tuple[Path, ...]:
    names = _text(values, key).split(FILE_SEPARATOR)
    return tuple(_absolute(key, name.strip()) for name in names if name.strip())


def _folder(values: NodeConfig, key: str) -> Path | None:
    name = _text(values, key)
    return _absolute(key, name) if name else None


def _absolute(key: str, name: str) -> Path:
    path = expanded(key, name)
    if not path.is_absolute():
        raise ConfigError(f"`{key}` names {name!r} but must be an absolute path.")
    return path


def _forms(name: str) -> set[str]:
    """Return the spellings of a path; none for what is no path."""
    if "/" not in name and not name.startswith("~"):
        return set()
    forms = {name}
    try:
        path = Path(name).expanduser()
        forms |= {str(path), os.path.abspath(path), str(path.resolve())}
    except (OSError, RuntimeError, ValueError):  # no such user, a loop of links, a null byte
        pass
    return {form.rstrip("/") for form in forms} - {"", "~", "."}
