"""Settings that have no effect are refused; a walk over the schema leaves out none."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from types import SimpleNamespace
from typing import get_type_hints

import pytest

from pilot_flwr.cli import main as cli
from pilot_flwr.config.loading import check_effect, config_folder, load_config
from pilot_flwr.config.rules import NEEDED, RULES, idle, limits
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError
from pilot_flwr.sweeps.jobs import SweepFolder, expand_jobs
from pilot_flwr.sweeps.runner import _effective, check_jobs


def leaves(section: type = PilotConfig, prefix: str = "") -> Iterator[tuple[str, type, type]]:
    """Yield every setting's name, type and section."""
    for name, kind in get_type_hints(section).items():
        if name in {field.name for field in fields(section)}:
            if is_dataclass(kind):
                yield from leaves(kind, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", kind, section


KINDS = {name: kind for name, kind, _ in leaves()}

ALWAYS = """
    name seed resume
    model.path model.revision model.dtype model.adapter_dtype model.sent_dtype model.initialisation
    model.client_adapter model.quantization model.device_map model.attention
    model.gradient_checkpointing model.compile model.system_prompt model.lora.rank model.lora.alpha
    model.lora.dropout model.lora.targets model.feature_cache.where
    data.source data.tasks data.clients_per_task data.train_examples data.test_examples
    data.workers data.evaluate_on
    strategy.name strategy.rounds strategy.trained_by strategy.stages strategy.self_weight
    strategy.fraction_train strategy.min_train_nodes strategy.min_available_nodes strategy.sampling
    strategy.min_replies strategy.below_minimum strategy.clients strategy.client_keys
    strategy.max_examples strategy.wait_seconds strategy.round_timeout_seconds
    strategy.close_after.fraction strategy.close_after.grace_seconds strategy.server_optimizer.name
    train.max_length train.autocast train.proximal_weight
    evaluation.enabled evaluation.batch_size evaluation.max_new_tokens
    privacy.enabled
    run.folder run.report run.tensorboard run.wandb
""".split()
"""Settings with an effect whatever the others are, or with a rule of their own."""

SWITCHES_NOTHING = """
    model.dtype model.adapter_dtype model.sent_dtype model.initialisation model.router_dtype
    model.stage2_client_adapter model.cross_task_adapters model.quantization model.attention
    model.gradient_checkpointing model.compile
    data.image_aspect_ratio data.image_reading data.check_images data.evaluate_on
    strategy.adapters strategy.distances strategy.sampling strategy.below_minimum
    train.over_long train.text_only train.schedule train.clipping train.loss_reduction
    train.batching train.autocast train.difference_loss.reduction train.balance_loss.reduction
    train.lora_matrices
    privacy.send_metrics run.report run.tensorboard
""".split()
"""Choices that leave every other setting its effect."""


def choices(name: str) -> tuple[object, ...]:
    """Return the values of a setting that is a choice; none for a number or free text."""
    *path, last = name.split(".")
    section = PilotConfig
    for part in path:
        section = get_type_hints(section)[part]
    if KINDS[name] is bool:
        return True, False
    for limit in limits(section)[last]:
        if ", " in limit.allowed and "'" not in limit.allowed:
            return tuple(limit.allowed.split(", "))
    return ()


def test_every_setting_is_known_to_matter_or_to_need_another_one():
    needing = {n for n in KINDS for need in NEEDED if f"{n}.".startswith(f"{need.setting}.")}
    needing -= {need.switch for need in NEEDED if need.switch.startswith(need.setting)}
    assert set(ALWAYS) == KINDS.keys() - needing


def test_every_choice_is_known_to_switch_settings_or_to_switch_nothing():
    switches = {need.switch for need in NEEDED} | {
        name for rule in RULES if len(rule.given) == 1 for name in rule.given
    }
    chosen = {name for name in KINDS if choices(name) and not name.endswith("name")}
    assert set(SWITCHES_NOTHING) == chosen - switches


def namespace(value: object) -> object:
    if isinstance(value, dict):
        return SimpleNamespace(**{key: namespace(inner) for key, inner in value.items()})
    return value


@pytest.mark.parametrize("need", NEEDED, ids=lambda need: f"{need.setting}-{need.switch}")
def test_a_setting_has_an_effect_with_the_values_that_it_needs_alone(need):
    values = choices(need.switch) or (0, 1, 2)
    allowed = need.allowed or values[1:]
    assert set(allowed) < set(values)
    settings = [n for n in KINDS if f"{n}.".startswith(f"{need.setting}.") and n != need.switch]
    assert settings
    others = [other for other in NEEDED if other.switch != need.switch]
    for value in values:
        config = namespace(asdict(PilotConfig()))
        for switch, chosen in {
            **{o.switch: (o.allowed or [1])[0] for o in others},
            need.switch: value,
        }.items():
            *path, last = switch.split(".")
            section = config
            for part in path:
                section = getattr(section, part)
            setattr(section, last, chosen)
        for setting in settings:
            reason = idle(setting, config)
            if value in allowed:
                assert reason is None or need.switch not in reason
            else:
                assert f"`{setting}` has no effect" in reason and need.switch in reason


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ("privacy.noise_multiplier=8", ("privacy.noise_multiplier", "privacy.enabled=false")),
        ("strategy=fedit strategy.num_neighbors=3", ("num_neighbors", "strategy.lora=global")),
        ("strategy=fedit strategy.neighbors=grouped", ("neighbors", "strategy.lora=global")),
        (
            "strategy=pilot_auto strategy.num_neighbors=3",
            ("strategy.num_neighbors", "strategy.neighbors=grouped"),
        ),
        ("data.partition={kind:iid,alpha:0.5} data.folder=/x", ("partition", "source=digits")),
        ("model.feature_cache={where:off,max_gib:2}", ("max_gib", "where=off")),
        ("simulation.engine=in-process simulation.address=auto", ("address", "engine=in-process")),
        ("data.allowed_broken=0.1", ("data.allowed_broken", "data.source=digits")),
        (
            "train.balance_weight=0 train.balance_loss.reduction=per_image",
            ("train.balance_loss.reduction", "train.balance_weight=0.0"),
        ),
        ("strategy=zero_shot train.epochs=3", ("train.epochs", "trained_by=nobody")),
        ("strategy=local strategy.distances=sketch", ("distances", "sharing.lora=none")),
        ("strategy=ditto train.epochs=2 train.personal.share=0.3", ("share", "model=whole")),
        ("train.personal.pull=1", ("train.personal.pull", "train.personal.model=none")),
        ("strategy=feddpa train.personal.temperature=2", ("temperature", "distillation=0.0")),
        (
            "strategy=feddpa train.epochs=2 train.personal={weighting:fixed,instances:3}",
            ("train.personal.instances", "weighting=fixed"),
        ),
        ("strategy=centralised strategy.distances=sketch", ("distances", "trained_by=pooled")),
    ],
)
def test_an_override_without_effect_is_refused(overrides, names, capsys):
    for command in ("run", "plan"):
        assert cli.main([command, *shlex.split(overrides)]) == 2
        message = capsys.readouterr().err
        assert all(name in message for name in names)


@pytest.mark.parametrize("method", sorted(f.stem for f in config_folder().glob("strategy/*.yaml")))
def test_what_shipped_files_set_is_not_checked(method):
    overrides = ["experiment=paper", f"strategy={method}", "train.epochs=2"][
        : 2 if method == "zero_shot" else 3
    ]
    check_effect(overrides, load_config(shlex.join(overrides)))


def test_a_switch_that_is_off_and_a_setting_that_is_used_may_be_written():
    for text in (
        "privacy.enabled=false train.personal.model=none run.wandb=off",
        "strategy.server_optimizer={name:adam,tau:1}",
    ):
        check_effect(shlex.split(text), load_config(text))


def test_a_sweeps_common_override_is_left_out_where_it_has_no_effect(tmp_path):
    pilot, fedit = expand_jobs(["strategy=pilot,fedit", "strategy.num_neighbors=3"])
    assert _effective(pilot) == ["strategy=pilot", "strategy.num_neighbors=3"]
    assert _effective(fedit) == ["strategy=fedit"]
    check_jobs(SweepFolder(tmp_path), [pilot, fedit])


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=fedit,local", "strategy.num_neighbors=3"],  # in no job
        ["strategy=pilot,fedit", "strategy.num_neighbors=1,2"],  # two equal jobs of fedit
    ],
)
def test_a_sweeps_override_without_effect_is_refused(overrides, tmp_path):
    with pytest.raises(ConfigError, match="`strategy.num_neighbors` has no effect"):
        check_jobs(SweepFolder(tmp_path), expand_jobs(overrides))
