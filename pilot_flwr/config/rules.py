"""Range checks of single settings, and cross-field validation rules.

Each check raises `ConfigError` with the setting as the user typed it (`key`), the value received
and what is allowed. A `Section` of the configuration declares its ranges once, as `Limit`
annotations, which it enforces and the settings reference prints. To add a range, write a check
and a `Limit` for it; to forbid a combination of settings, add a row to `RULES`; for a setting that
only matters with another one, a row to `NEEDED`.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_type_hints

from pilot_flwr.errors import ConfigError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Run, task and client names, which become file names, record keys and module names."""

LONGEST_NAME = 64
"""Characters of such a name: short enough for a file name after a suffix is added."""


def at_least(key: str, value: float, minimum: float) -> None:
    """Raise unless `value` is finite and not below `minimum`."""
    if not minimum <= value < math.inf:
        finite = "" if value < minimum else " and finite"
        raise ConfigError(f"`{key}` is {value} but must be at least {minimum}{finite}.")


def one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless `value` is among `allowed`."""
    if value not in allowed:
        raise ConfigError(f"`{key}` is {value!r} but must be one of {', '.join(allowed)}.")


def check_name(key: str, value: str, *, longest: int = LONGEST_NAME) -> None:
    """Raise unless `value` can serve as a file name, a record key and a module name."""
    if len(value) > longest:
        raise ConfigError(
            f"`{key}` is {value[:20]!r}…, {len(value)} characters, but must have at most {longest}."
        )
    if not NAME_PATTERN.fullmatch(value):
        raise ConfigError(
            f"`{key}` is {value!r} but must be letters, digits, '_' and '-' only, "
            "beginning with a letter or digit."
        )


def expanded(key: str, path: str) -> Path:
    """Return `path` with ``~`` or ``~user`` expanded; raise if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"`{key}` begins with '~' and the name of no user.") from None


class Limit(NamedTuple):
    """The allowed values of a setting: text for the reference, and a check of (key, value)."""

    allowed: str
    check: Callable[[str, Any], None]


def _limit(allowed: str, holds: Callable[[Any], bool]) -> Limit:
    def check(key: str, value: Any) -> None:
        if not holds(value):
            raise ConfigError(f"`{key}` is {value!r} but must be {allowed}.")

    return Limit(allowed, check)


POSITIVE = _limit("above 0 and finite", lambda value: 0 < value < math.inf)
FRACTION = _limit("at least 0 and below 1", lambda value: 0 <= value < 1)
PART = _limit("above 0 and at most 1", lambda value: 0 < value <= 1)
SHARE = _limit("from 0 to 1", lambda value: 0 <= value <= 1)
ABSOLUTE = _limit("empty or an absolute path", lambda value: not value or value[0] in "/~")
NOT_EMPTY = _limit("non-empty", bool)
NAME = Limit(f"letters, digits, '_', '-'; at most {LONGEST_NAME} characters", check_name)


def minimum(value: float) -> Limit:
    """Limit a setting to at least `value`."""
    return Limit(f"at least {value}", functools.partial(at_least, minimum=value))


def maximum(value: float) -> Limit:
    """Limit a setting to at most `value`."""
    return _limit(f"at most {value}", lambda found: -math.inf < found <= value)


def choice(*values: str) -> Limit:
    """Limit a setting to one of `values`."""
    return Limit(", ".join(values), functools.partial(one_of, allowed=values))


def limits(settings: type) -> dict[str, tuple[Limit, ...]]:
    """Return the limits of every field of a dataclass of settings, in declaration order."""
    hints = get_type_hints(settings, include_extras=True)
    return {f.name: getattr(hints[f.name], "__metadata__", ()) for f in fields(settings)}


def check_limits(settings: object, section: str) -> None:
    """Raise `ConfigError` unless every field of a dataclass keeps to its limits.

    `section` is its dotted name, such as ``train.stage1``; empty for the configuration itself.
    """
    for name, declared in limits(type(settings)).items():
        for limit in declared:
            limit.check(f"{section}.{name}" if section else name, getattr(settings, name))


class Section:
    """Base of the dataclasses of settings: checks the limits of an instance when it is made.

    `prefix` is the section's dotted name: ``class PrivacyConfig(Section, prefix="privacy")``.
    """

    _prefix: ClassVar[str]

    def __init_subclass__(cls, prefix: str) -> None:
        cls._prefix = prefix

    def __post_init__(self) -> None:
        check_limits(self, self._prefix)


class Rule(NamedTuple):
    """Values that other settings must have if the given ones hold."""

    given: dict[str, object]
    needed: dict[str, object]


_ALL_SHARED = {"strategy.sharing.adapter": True, "strategy.sharing.lora": "AB"}
_ONE_CONNECTOR = {"strategy.stages": 1, "model.client_adapter": False}
_NOTHING_SHARED: dict[str, object] = {
    "strategy.sharing.adapter": False,
    "strategy.sharing.lora": "none",
}
_NO_TRAINING: dict[str, object] = {"strategy.trained_by": "nobody"}

RULES = (
    # One model for all clients: nothing is private to a client.
    Rule(
        {"strategy.trained_by": "pooled"},
        {
            **_ONE_CONNECTOR,
            **_ALL_SHARED,
            "strategy.adapters": "global",
            "strategy.lora": "global",
            "strategy.clients": 0,
            "strategy.fraction_train": 1,
            "strategy.fraction_evaluate": 1,
            "strategy.min_train_nodes": 0,  # one client trains
            "train.personal.model": "none",
            "privacy.enabled": False,
        },
    ),
    # A personal model starts as the received one, so all trained parameters are shared.
    *(
        Rule(
            {"train.personal.model": model},
            {
                **_ONE_CONNECTOR,
                **_ALL_SHARED,
                "strategy.trained_by": "clients",
                "train.schedule": "exchange",  # the moments of one model are kept, not of two
            },
        )
        for model in ("whole", "beside")
    ),
    # FedEx-LoRA needs the products B A, and their mean rather than a step towards it.
    Rule(
        {"strategy.lora": "exact"},
        {
            "strategy.sharing.lora": "AB",
            "strategy.server_optimizer.name": "none",
            "train.personal.model": "none",
            "train.lora_matrices": "AB",
        },
    ),
    # B alone is trained, A alone is sent.
    Rule({"train.lora_matrices": "B", "strategy.sharing.lora": "A"}, {"train.lora_matrices": "AB"}),
    # Gradients in float16 need loss scaling, which bfloat16 autocast makes unnecessary.
    Rule(
        {"model.dtype": "float16", "train.autocast": "off"},
        {"strategy.trained_by": "nobody"},
    ),
    # Flash attention computes in 16 bits.
    Rule(
        {"model.attention": "flash_attention_2", "train.autocast": "off"},
        {"model.dtype": "bfloat16"},
    ),
    # Either one model over all GPUs, or one model per process.
    Rule({"model.device_map": "auto"}, {"simulation.client_processes": 1}),
    # Without training only scores remain.
    Rule(
        _NO_TRAINING,
        {
            "evaluation.enabled": True,
            "privacy.enabled": False,
            "strategy.fraction_train": 1,  # `strategy.fraction_evaluate` samples instead
            "strategy.min_train_nodes": 0,
            "strategy.server_optimizer.name": "none",
            "train.proximal_weight": 0,
        },
    ),
    Rule({"strategy.self_weight": False}, {"strategy.lora": "adaptive"}),
    # Nothing is sent, so there is nothing to pull towards and nothing to protect.
    Rule(_NOTHING_SHARED, {"train.proximal_weight": 0, "privacy.enabled": False}),
    # Only uploads are compressed.
    *(
        Rule({**no_uploads, "model.sent_dtype": compressed}, {"model.sent_dtype": "bfloat16"})
        for no_uploads in (_NO_TRAINING, _NOTHING_SHARED)
        for compressed in ("int8", "int4")
    ),
)


class Need(NamedTuple):
    """`setting`, or every setting of a section, has no effect unless `switch` is in `allowed`."""

    setting: str
    switch: str
    allowed: tuple[object, ...]


ABOVE_0: tuple[object, ...] = ()
"""`Need.allowed` of a number that must not be 0."""

_TRAINS = ("clients", "pooled")

NEEDED = (
    Need("privacy", "privacy.enabled", (True,)),
    Need("model.feature_cache.max_gib", "model.feature_cache.where", ("memory", "disk")),
    Need("model.lora.client_ranks", "strategy.clients", (0,)),
    Need("model.stage2_client_adapter", "model.client_adapter", (True,)),
    Need("model.stage2_client_adapter", "strategy.stages", (2,)),
    Need("model.cross_task_adapters", "strategy.stages", (2,)),
    Need("model.router_dtype", "strategy.stages", (2,)),
    Need("data.files", "data.source", ("llava",)),
    Need("data.folder", "data.source", ("llava",)),
    Need("data.partition", "data.source", ("llava",)),
    *(
        Need(f"data.{name}", "data.source", ("llava",))
        for name in (
            *("image_aspect_ratio", "image_reading", "linked_folders"),
            *("check_images", "allowed_broken", "allowed_overlap"),
        )
    ),
    Need("data.allowed_overlap", "evaluation.enabled", (True,)),
    Need("data.partition.alpha", "data.partition.kind", ("dirichlet",)),
    Need("data.partition.column", "data.partition.kind", ("dirichlet",)),
    Need("data.partition.min_examples", "data.partition.kind", ("dirichlet",)),
    Need("strategy.adapters", "strategy.sharing.adapter", (True,)),
    Need("strategy.lora", "strategy.sharing.lora", ("AB", "A", "B")),
    Need("strategy.neighbors", "strategy.lora", ("adaptive",)),
    Need("strategy.neighbors", "strategy.sharing.lora", ("AB", "A", "B")),
    Need("strategy.num_neighbors", "strategy.neighbors", ("fixed",)),
    Need("strategy.num_neighbors", "strategy.lora", ("adaptive",)),
    Need("strategy.num_neighbors", "strategy.sharing.lora", ("AB", "A", "B")),
    Need("strategy.distances", "strategy.trained_by", ("clients",)),
    Need("strategy.distances", "strategy.sharing.lora", ("AB", "A", "B")),
    *(
        Need(f"strategy.{name}", "strategy.trained_by", _TRAINS)
        for name in ("adapters", "lora", "neighbors", "num_neighbors", "sharing")
    ),
    Need("strategy.fraction_evaluate", "evaluation.enabled", (True,)),
    Need("strategy.server_optimizer", "strategy.server_optimizer.name", ("adam",)),
    Need("strategy.update_norm", "strategy.trained_by", ("clients",)),
    Need("strategy.update_norm.factor", "strategy.update_norm.action", ("warn", "clip", "reject")),
    *(
        Need(f"train.{name}", "strategy.trained_by", _TRAINS)
        for name in (
            *("epochs", "batch_size", "accumulation_steps", "over_long", "text_only"),
            *("warmup_ratio", "schedule", "weight_decay", "max_grad_norm", "clipping"),
            *("loss_reduction", "batching", "log_every_seconds", "stage1", "stage2"),
            *("difference_loss", "balance_loss", "balance_weight", "z_weight", "lr_scale"),
            *("lora_matrices", "personal"),
        )
    ),
    Need("train.stage2", "strategy.stages", (2,)),
    Need("train.difference_loss", "model.client_adapter", (True,)),
    Need("train.difference_loss.reduction", "train.difference_loss.weight", ABOVE_0),
    Need("train.balance_loss", "strategy.stages", (2,)),
    Need("train.balance_loss", "train.balance_weight", ABOVE_0),
    Need("train.balance_weight", "strategy.stages", (2,)),
    Need("train.z_weight", "strategy.stages", (2,)),
    Need("train.personal.pull", "train.personal.model", ("whole", "beside")),
    *(
        Need(f"train.personal.{name}", "train.personal.model", ("beside",))
        for name in ("share", "weighting", "instances", "distillation", "temperature")
    ),
    Need("train.personal.instances", "train.personal.weighting", ("similarity",)),
    Need("train.personal.temperature", "train.personal.distillation", ABOVE_0),
    Need("simulation", "strategy.clients", (0,)),
    Need("simulation.address", "simulation.engine", ("ray",)),
    Need("run.restarts", "simulation.engine", ("ray",)),
    Need("run.wandb_project", "run.wandb", ("online", "offline")),
)
"""A switch is exempt from its own rows: ``privacy.enabled=false`` is allowed."""


def idle(setting: str, config: object) -> str | None:
    """Return why a setting has no effect in a configuration, or None if it has one."""
    for need in NEEDED:
        inside = f"{setting}.".startswith(f"{need.setting}.") and setting != need.switch
        found = attrgetter(need.switch)(config) if inside else None
        if inside and (found not in need.allowed if need.allowed else not found):
            allowed = " or ".join(map(_text, need.allowed)) or "a value above 0"
            return (
                f"`{setting}` has no effect with `{need.switch}={_text(found)}`: set "
                f"`{need.switch}` to {allowed}, or omit `{setting}`."
            )
    return None


def check_combinations(config: object) -> None:
    """Raise `ConfigError` unless a configuration satisfies `RULES`."""
    for given, needed in RULES:
        if any(attrgetter(name)(config) != value for name, value in given.items()):
            continue
        for name, value in needed.items():
            others = {other: held for other, held in given.items() if other != name}
            reason = " ".join(f"{other}={_text(held)}" for other, held in others.items())
            if (found := attrgetter(name)(config)) != value:
                raise ConfigError(
                    f"`{name}` is {_text(found)} but must be {_text(value)} with `{reason}`."
                )


SMALLER_RANK: dict[str, tuple[object, ...]] = {
    "strategy.trained_by": ("clients",),
    "strategy.sharing.lora": ("AB",),  # products need both factors
    "strategy.lora": ("adaptive", "task", "global"),
    "strategy.distances": ("exact",),
    "train.lora_matrices": ("AB",),
    # These keep values of the factors between exchanges, and a truncation replaces the factors.
    "strategy.server_optimizer.name": ("none",),
    "train.schedule": ("exchange",),
    "train.personal.model": ("none",),
    "model.sent_dtype": ("same", "float32", "bfloat16"),
}
"""Values that settings must have in a run with a client of a smaller LoRA rank."""


def check_lora_rank(key: str, rank: int, config: Any) -> None:
    """Raise `ConfigError` unless a client of a run may train this LoRA rank."""
    at_least(key, rank, 1)
    largest = config.model.lora.rank
    if rank > largest:
        raise ConfigError(f"`{key}` is {rank} but must be at most {largest}, `model.lora.rank`.")
    for name, allowed in SMALLER_RANK.items() if rank < largest else ():
        if (found := attrgetter(name)(config)) not in allowed:
            raise ConfigError(
                f"`{name}` is {_text(found)} but must be {' or '.join(map(_text, allowed))} with "
                f"`{key}={rank}`, a smaller LoRA rank than the run's `model.lora.rank={largest}`."
            )


def check_sampling(strategy: Any, clients: int, tasks: int) -> None:
    """Raise `ConfigError` unless a federation of `clients` can satisfy the sampling settings."""
    for name in ("min_replies", "min_train_nodes", "min_available_nodes"):
        if (least := getattr(strategy, name)) > clients:
            raise ConfigError(
                f"`strategy.{name}` is {least} but must be at most the number of clients, "
                f"{clients}."
            )
    least_share = f"it must be at least {math.ceil(1e6 / clients) / 1e6:g}"
    for name, least in (("fraction_train", strategy.min_train_nodes), ("fraction_evaluate", 0)):
        drawn = max(int(clients * getattr(strategy, name)), least)
        which = f"`strategy.{name}` is {getattr(strategy, name)}, which draws "
        if not drawn:
            other = ", or set `strategy.min_train_nodes`" * (name == "fraction_train")
            raise ConfigError(f"{which}none of {clients} clients: {least_share}{other}.")
        if name == "fraction_train" and drawn < strategy.min_replies:
            raise ConfigError(
                f"`strategy.min_replies` is {strategy.min_replies} but an exchange draws "
                f"{drawn} of {clients} clients: raise `strategy.fraction_train` or "
                "`strategy.min_train_nodes`."
            )
        if strategy.sampling == "stratified" and drawn < tasks:
            raise ConfigError(
                f"{which}{drawn} of {clients} clients, but `strategy.sampling=stratified` needs "
                f"one for each of {tasks} tasks."
            )


def check_simulation(strategy: Any) -> None:
    """Raise `ConfigError` for settings of real sites in a simulation."""
    if strategy.client_keys:
        raise ConfigError(
            "`strategy.client_keys` lists the keys of real sites, but simulated clients have none: "
            "omit it, or use `--superlink`."
        )
    if strategy.close_after.fraction < 1:
        raise ConfigError(
            f"`strategy.close_after.fraction` is {strategy.close_after.fraction:g} but must be 1 "
            "in a simulation: when a simulated client answers depends on this machine, so results "
            "would not be reproducible. Omit it, or use `--superlink`."
        )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
