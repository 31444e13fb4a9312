"""Parse a site's ``--node-config``: types, ranges and paths, without touching the disk.

To add a key, add a row to `KEYS`, a field to `NodeSettings` and a row to the table in
docs/reference/sites.md.
"""

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pilot_flwr.client.privacy_accountant import PrivacyDemands
from pilot_flwr.config import rules
from pilot_flwr.errors import ConfigError

NodeConfig = Mapping[str, bool | float | int | str]
"""As Flower's context carries it."""

KEYS = {
    "client-id": "name of this site, letters, digits, '_' and '-'",
    "task": "one of the run's `data.tasks`",
    "train-file": "training data: JSON, JSONL or a Hugging Face data set",
    "test-file": "test data: JSON, JSONL or a Hugging Face data set",
    "image-folder": "folder of the images",
    "linked-folders": "folders outside `image-folder` that links in it may lead to",
    "allowed-overlap": "share of the test rows that may be training rows too",
    "state-folder": "folder of the private adapters",
    "identity-key": "file with this client's private key",
    "device": "auto, cpu, cuda or cuda:N",
    "processes": "processes that train and evaluate together, each on a GPU of its own",
    "model-path": "folder of the base model",
    "micro-batch": "examples at once in memory",
    "lora-rank": "rank of this site's LoRA, at most the run's",
    "max-feature-gib": "largest cache of image features, in memory or on disk",
    "min-noise-multiplier": "least `privacy.noise_multiplier` of a run",
    "max-clip-norm": "largest `privacy.clip_norm` of a run",
    "max-epsilon": "largest ε of all uploads of this site, over all runs",
    "privacy-delta": "the δ of `max-epsilon`",
    "allow-metrics": "true if losses and scores may leave beside private uploads",
}
"""Every key of a real site's node config, and its meaning."""

FLOWER_KEYS = ("partition-id", "num-partitions")
"""Written by Flower's simulation engine into every node config; a real site may have them."""

FILE_SEPARATOR = ";"
"""Separates the paths of ``train-file``, ``test-file`` and ``linked-folders``."""


@dataclass(frozen=True)
class NodeSettings:
    """A parsed node config; paths are absolute."""

    client_id: str = ""
    task: str = ""
    partition_id: int | None = None
    num_partitions: int | None = None
    train_files: tuple[Path, ...] = ()
    test_files: tuple[Path, ...] = ()
    image_folder: Path | None = None
    linked_folders: tuple[Path, ...] = ()
    allowed_overlap: float = 0.0
    state_folder: Path | None = None
    identity_key: Path | None = None
    device: str = "auto"
    processes: int = 0
    model_path: Path | None = None
    micro_batch: int = 0
    lora_rank: int = 0
    max_feature_gib: float = 100.0
    demands: PrivacyDemands = PrivacyDemands()


def read_node_config(values: NodeConfig) -> NodeSettings:
    """Parse a node config without touching the disk."""
    for key in values:
        if key not in KEYS and key not in FLOWER_KEYS:
            near = difflib.get_close_matches(key.lower().replace("_", "-"), KEYS, n=1, cutoff=0.75)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ConfigError(
                f"`{key}` in the node config is not a key of a site.{hint} Keys are "
                f"{', '.join(KEYS)}."
            )
    settings = NodeSettings(
        client_id=_text(values, "client-id"),
        task=_text(values, "task"),
        partition_id=_whole(values, "partition-id"),
        num_partitions=_whole(values, "num-partitions"),
        train_files=_paths(values, "train-file"),
        test_files=_paths(values, "test-file"),
        image_folder=_path(values, "image-folder"),
        linked_folders=_paths(values, "linked-folders"),
        allowed_overlap=_number(values, "allowed-overlap", rules.SHARE),
        state_folder=_path(values, "state-folder"),
        identity_key=_path(values, "identity-key"),
        device=_text(values, "device") or "auto",
        model_path=_path(values, "model-path"),
        processes=_whole(values, "processes") or 0,
        micro_batch=_whole(values, "micro-batch") or 0,
        lora_rank=_whole(values, "lora-rank") or 0,
        max_feature_gib=_number(values, "max-feature-gib", rules.POSITIVE) or 100.0,
        demands=_demands(values),
    )
    if "client-id" in values:
        rules.check_name("client-id", settings.client_id)
    for key, number in (
        ("processes", settings.processes),
        ("micro-batch", settings.micro_batch),
        ("lora-rank", settings.lora_rank),
    ):
        if key in values:
            rules.at_least(key, number, 1)
    return settings


def private_paths(values: NodeConfig) -> dict[str, str]:
    """Return the paths that no error may disclose to the server, each with its replacement.

    These are every path in a node config, valid or not, as written, with ``~`` expanded and with
    links resolved; the folders of the files; and the home folder.
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
    keys = ("min-noise-multiplier", "max-clip-norm", "max-epsilon", "privacy-delta")
    limits = {
        key.removeprefix("privacy-").replace("-", "_"): _number(values, key, rules.POSITIVE)
        for key in keys
        if key in values
    }
    rules.FRACTION.check("privacy-delta", limits.get("delta", 0))
    allow = values.get("allow-metrics", False)
    if not isinstance(allow, bool):
        raise ConfigError(f"`allow-metrics` is {allow!r} but must be true or false.")
    return PrivacyDemands(**limits, allow_metrics=allow)


def _number(values: NodeConfig, key: str, limit: rules.Limit) -> float:
    value = values.get(key, 0.0)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"`{key}` is {value!r} but must be a number: {KEYS[key]}.")
    if key in values:
        limit.check(key, number)
    return number


def _paths(values: NodeConfig, key: str) -> tuple[Path, ...]:
    names = [name.strip() for name in _text(values, key).split(FILE_SEPARATOR)]
    return tuple(_absolute(key, name) for name in names if name)


def _path(values: NodeConfig, key: str) -> Path | None:
    name = _text(values, key)
    return _absolute(key, name) if name else None


def _absolute(key: str, name: str) -> Path:
    path = rules.expanded(key, name)
    if not path.is_absolute():
        raise ConfigError(f"`{key}` names {name!r} but must be an absolute path.")
    return path


def _forms(name: str) -> set[str]:
    """Return the spellings of a path; none for other text."""
    if "/" not in name and not name.startswith("~"):
        return set()
    forms = {name}
    try:
        path = Path(name).expanduser()
        forms |= {str(path), os.path.abspath(path), str(path.resolve())}
    except (OSError, RuntimeError, ValueError):  # no such user, a loop of links, a null byte
        pass
    return {form.rstrip("/") for form in forms} - {"", "~", "."}
