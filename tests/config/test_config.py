import dataclasses

import numpy as np
import pytest
import torch

from pilot_flwr.config.loading import (
    config_folder,
    from_yaml,
    load_config,
    to_dict,
    to_yaml,
)
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError


def test_the_default_is_the_demo():
    config = load_config()
    assert config == load_config("experiment=demo")
    assert config.num_clients == 9


def test_overrides_are_split_as_in_a_shell():
    config = load_config("strategy.rounds=1 'run.folder=\"/tmp/a b, c=d\"'")
    assert (config.strategy.rounds, config.run.folder) == (1, "/tmp/a b, c=d")


def test_text_becomes_the_type_of_the_field():
    assert load_config("train.stage2.lora_lr=1e-4").train.stage2.lora_lr == 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train.lrr=1", "train.lrr"),
        ("+train.lrr=1", "lrr"),
        ("train.epochs=many", "'many' of type 'str' could not be converted to Integer"),
        ("strategy.rounds=1.5", "'1.5' of type 'float' could not be converted to Integer"),
        ("train.stage1.lora_lr=null", "train.stage1.lora_lr"),
        ("data.tasks=3", "data.tasks"),
        ("model=nothing", "`model` is .nothing. but must be one of llava-1.5-13b, "),
        ("strategy.rounds", "strategy.rounds"),
        ("'open", "No closing quotation"),
        ("strategy.num_neighbors=0", r"`strategy\.num_neighbors` is 0 but must be at least 1\."),
        ("strategy.rounds=0", r"`strategy\.rounds` is 0 but must be at least 1\."),
        ("strategy.lora=best", r"`strategy\.lora` is 'best' but must be one of adaptive, task"),
        ("strategy.min_replies=10", "at most the number of clients, 9"),
        ("strategy.update_norm.action=drop", "must be one of off, warn, clip, reject"),
        ("strategy.update_norm.factor=0.5", r"`strategy\.update_norm\.factor` is 0\.5 but must be"),
        ("strategy.max_examples=-1", r"`strategy\.max_examples` is -1 but must be at least 0"),
        ("strategy.wait_seconds=-1", r"`strategy\.wait_seconds` is -1\.0 but must be above 0"),
        ("train.stage2.connector_lr=0", r"`train\.stage2\.connector_lr` is 0\.0 but must be above"),
        ("train.stage1.lora_lr=nan", r"`train\.stage1\.lora_lr` is nan but must be above 0"),
        ("train.warmup_ratio=1", r"`train\.warmup_ratio` is 1\.0 but must be at least 0 and below"),
        ("train.difference_loss.reduction=sum", "one of normalized, frobenius, official"),
        ("train.difference_loss.weight=-1", r"`train\.difference_loss\.weight` is -1\.0"),
        ("model.initialisation=random", "one of identity, official"),
        ("model.lora.rank=0", r"`model\.lora\.rank` is 0 but must be at least 1"),
        ("model.lora.targets=[]", r"`model\.lora\.targets` is empty"),
        ("data.tasks=[]", r"`data\.tasks` is empty"),
        ("data.tasks=[vqa,vqa]", "must not name a task twice"),
        ("data.tasks=[a.b]", r"`data\.tasks` is 'a\.b' but must be letters, digits"),
        ("name=../up", r"`name` is '\.\./up' but must be letters"),
        ("seed=-1", r"`seed` is -1 but must be at least 0"),
        ("seed=9223372036854775808", r"`seed` is 9223372036854775808 but must be at most 92233"),
        ("train.difference_loss.weight=inf", r"`train\.difference_loss\.weight` is inf but .* fin"),
        ("train.balance_weight=nan", r"`train\.balance_weight` is nan but must be at least 0 and"),
        ("train.z_weight=inf", r"`train\.z_weight` is inf but must be at least 0 and finite"),
        ("train.weight_decay=inf", r"`train\.weight_decay` is inf but must be"),
        ("simulation.gpus=0.5", r"(?s)could not be converted to Integer.*simulation\.gpus"),
        ("simulation.gpus=inf", r"(?s)could not be converted to Integer.*simulation\.gpus"),
        ("simulation.gpus=-2", r"`simulation\.gpus` is -2 but must be at least -1"),
        ("simulation.client_gpus=-0.5", r"`simulation\.client_gpus` is -0\.5 but must be"),
        ("simulation.client_gpus=nan", r"`simulation\.client_gpus` is nan but must be"),
        ("simulation.client_gpus=inf", r"`simulation\.client_gpus` is inf but must be"),
        ("simulation.client_gpus=1.5", r"`simulation\.client_gpus` is 1\.5 but .* whole number"),
    ],
)
def test_an_error_names_the_key_and_what_is_allowed(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides)


def test_the_largest_seed_is_one_that_torch_and_numpy_take():
    seed = load_config(f"seed={2**63 - 1}").seed
    torch.Generator().manual_seed(seed)
    np.random.default_rng([seed, 1])


@pytest.mark.parametrize(
    "path", sorted(config_folder().rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_shipped_choice_composes(path):
    group = path.parent.name
    overrides = "" if group == "conf" else f"{group}={path.stem}"
    assert isinstance(load_config(overrides), PilotConfig)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().train.epochs = 7


def test_yaml_and_dict_hold_every_value():
    config = load_config("strategy.rounds=7")
    assert to_dict(config)["strategy"]["rounds"] == 7
    assert "rounds: 7" in to_yaml(config)
    assert dataclasses.asdict(config) == to_dict(config)


def test_yaml_is_read_back():
    config = load_config("data.tasks=[vqa] seed=7 'run.folder=\"/tmp/a b\"'")
    assert from_yaml(to_yaml(config)) == config
    assert from_yaml(to_yaml(config), ["seed=8", "model.lora.rank=3"]) == dataclasses.replace(
        config,
        seed=8,
        model=dataclasses.replace(
            config.model, lora=dataclasses.replace(config.model.lora, rank=3)
        ),
    )


@pytest.mark.parametrize(
    "text, overrides, words",
    [
        ("a: 1", [], "'a' not in"),
        ("model: {rank: 3}", [], "model.rank"),
        ("seed: x", [], "Key: seed"),
        ("seed: -1", [], "`seed` is -1"),
        ("model: 3", [], "ModelConfig"),
        ("- a", [], "merge"),
        ("a: [", [], "parsing"),
        ("seed: 1", ["seed"], "'seed' must be `key=value`"),
        ("seed: 1", ["speed=2"], "'speed' not in"),
    ],
)
def test_yaml_that_is_no_configuration_is_refused(text, overrides, words):
    with pytest.raises(ConfigError, match=words):
        from_yaml(text, overrides)
