import ast
import dataclasses
import itertools
import re
from math import inf, nan
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pilot_flwr.config import data, model, schema, train
from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.loading import config_folder, from_yaml, load_config, to_dict, to_yaml
from pilot_flwr.config.model import LoraConfig, ModelConfig
from pilot_flwr.config.rules import SMALLER_RANK, limits
from pilot_flwr.config.schema import (
    PilotConfig,
    SimulationConfig,
    StrategyConfig,
    UpdateNormConfig,
)
from pilot_flwr.config.train import (
    BalanceLossConfig,
    DifferenceLossConfig,
    StageConfig,
    TrainConfig,
)
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
        ("model=nothing", "`model` is .nothing. but must be one of .*llava-1.5-13b, "),
        ("strategy.rounds", "strategy.rounds"),
        ("'open", "No closing quotation"),
        ("strategy.num_neighbors=0", r"`strategy\.num_neighbors` is 0 but must be at least 1\."),
        ("strategy.min_replies=10", "at most the number of clients, 9"),
        ("train.stage2.connector_lr=0", r"`train\.stage2\.connector_lr` is 0\.0 but must be above"),
        ("seed=9223372036854775808", r"`seed` is 9223372036854775808 but must be at most 92233"),
        ("simulation.gpus=0.5", r"(?s)could not be converted to Integer.*simulation\.gpus"),
        ("simulation.gpus=inf", r"(?s)could not be converted to Integer.*simulation\.gpus"),
    ],
)
def test_an_error_names_the_key_and_what_is_allowed(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (StrategyConfig, {"rounds": 0}, r"`strategy\.rounds` is 0 but must be at least 1\."),
        (StrategyConfig, {"lora": "best"}, "`strategy.lora` is 'best' .* one of adaptive, task"),
        (StrategyConfig, {"max_examples": -1}, "`strategy.max_examples` is -1 .* at least 0"),
        (StrategyConfig, {"wait_seconds": -1.0}, "`strategy.wait_seconds` is -1.0 .* above 0"),
        (StrategyConfig, {"stages": 3}, "`strategy.stages` is 3 but must be at most 2"),
        (UpdateNormConfig, {"action": "drop"}, "must be one of off, warn, clip, reject"),
        (UpdateNormConfig, {"factor": 0.5}, "`strategy.update_norm.factor` is 0.5 but must be"),
        (TrainConfig, {"stage1": StageConfig(lora_lr=nan)}, "`train.stage1.lora_lr` is nan .* 0"),
        (TrainConfig, {"stage2": StageConfig(0.1, 0.0)}, "`train.stage2.connector_lr` is 0.0"),
        (TrainConfig, {"warmup_ratio": 1.0}, "`train.warmup_ratio` is 1.0 .* least 0 and below"),
        (TrainConfig, {"balance_weight": nan}, "`train.balance_weight` is nan .* at least 0 and"),
        (TrainConfig, {"z_weight": inf}, "`train.z_weight` is inf .* at least 0 and finite"),
        (TrainConfig, {"weight_decay": inf}, "`train.weight_decay` is inf but must be"),
        (BalanceLossConfig, {"reduction": "sum"}, "`train.balance_loss.reduction` is .*per_image"),
        (TrainConfig, {"schedule": "epoch"}, "`train.schedule` is 'epoch' .* exchange, run"),
        (TrainConfig, {"clipping": "none"}, "`train.clipping` is 'none' .* group, global"),
        (DifferenceLossConfig, {"reduction": "sum"}, "one of normalized, frobenius, official"),
        (DifferenceLossConfig, {"weight": -1.0}, "`train.difference_loss.weight` is -1.0"),
        (DifferenceLossConfig, {"weight": inf}, "`train.difference_loss.weight` is inf .* fin"),
        (ModelConfig, {"initialisation": "random"}, "one of identity, official"),
        (LoraConfig, {"rank": 0}, "`model.lora.rank` is 0 but must be at least 1"),
        (LoraConfig, {"targets": []}, r"`model.lora.targets` is \[\] but must be non-empty"),
        (DataConfig, {"tasks": []}, r"`data.tasks` is \[\] but must be non-empty"),
        (DataConfig, {"tasks": ["vqa", "vqa"]}, "must not name a task twice"),
        (DataConfig, {"tasks": ["a.b"]}, "`data.tasks` is 'a.b' but must be letters, digits"),
        (DataConfig, {"train_examples": 0}, "`data.train_examples` is 0 but must be at least 1"),
        (PilotConfig, {"name": "../up"}, "`name` is '../up' but must be letters"),
        (PilotConfig, {"seed": -1}, "`seed` is -1 but must be at least 0"),
        (SimulationConfig, {"gpus": -2}, "`simulation.gpus` is -2 but must be at least -1"),
        (SimulationConfig, {"client_gpus": -0.5}, "`simulation.client_gpus` is -0.5 but must be"),
        (SimulationConfig, {"client_gpus": nan}, "`simulation.client_gpus` is nan but must be"),
        (SimulationConfig, {"client_gpus": inf}, "`simulation.client_gpus` is inf but must be"),
        (
            SimulationConfig,
            {"client_gpus": 0.5, "client_processes": 2},
            "`simulation.client_gpus` is 0.5 but must be 0 or at least .*client_processes`, 2",
        ),
        (
            SimulationConfig,
            {"client_gpus": 1.5},
            "`simulation.client_gpus` is 1.5 .* be whole if",
        ),
    ],
)
def test_a_value_out_of_range_is_named_as_the_user_types_it(section, values, message):
    with pytest.raises(ConfigError, match=message):
        section(**values)


def sections(settings=None, prefix=""):
    """Yield every section of the configuration with its dotted name."""
    settings = settings or PilotConfig()
    yield settings, prefix
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(value := getattr(settings, field.name)):
            yield from sections(value, f"{prefix}{field.name}.")


def outside(limit):
    """Return a value that a limit forbids, derived from its text."""
    kind, _, bound = limit.allowed.rpartition(" ")
    if kind == "at least":
        return float(bound) - 1
    if kind == "at most":
        return float(bound) * 2
    forbidden = {
        "above 0 and finite": 0,
        "at least 0 and below 1": 1,
        "non-empty": "",
        "from 0 to 1": 1.1,
        "above 0 and at most 1": 0,
    }
    return forbidden.get(limit.allowed, "no such/choice")


@pytest.mark.parametrize(
    ("settings", "prefix"), list(sections()), ids=[name or "top" for _, name in sections()]
)
def test_every_limit_holds_for_its_default_and_is_enforced(settings, prefix):
    for name, declared in limits(type(settings)).items():
        for limit in declared:
            limit.check(prefix + name, getattr(settings, name))
            with pytest.raises(ConfigError, match=f"`{prefix}{name}` is"):
                limit.check(prefix + name, outside(limit))


def test_every_setting_is_documented():
    """The settings reference is generated from the docstrings under the fields."""
    seen = set()
    for module in (schema, data, model, train):
        for kind in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
            if not isinstance(kind, ast.ClassDef):
                continue
            for node, following in itertools.pairwise(kind.body):
                if not isinstance(node, ast.AnnAssign):
                    continue
                documented = isinstance(following, ast.Expr) and isinstance(
                    following.value, ast.Constant
                )
                nested = ast.unparse(node.annotation).endswith("Config")
                assert documented != nested, f"{kind.name}.{node.target.id}"
                seen.add((kind.name, node.target.id))
    declared = {(type(s).__name__, f.name) for s, _ in sections() for f in dataclasses.fields(s)}
    assert declared <= seen


def test_the_largest_seed_is_one_that_torch_and_numpy_take():
    seed = load_config(f"seed={2**63 - 1}").seed
    torch.Generator().manual_seed(seed)
    np.random.default_rng([seed, 1])


SHIPPED = [
    path for path in sorted(config_folder().rglob("*.yaml")) if path.parent.stem != "strategy"
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_choice_composes(path):
    """Those of conf/strategy/ are composed in tests/config/test_methods.py."""
    group = path.parent.name
    overrides = "" if group == "conf" else f"{group}={path.stem}"
    assert isinstance(load_config(overrides), PilotConfig)


@pytest.mark.parametrize(
    "words",
    [
        "seed=3 strategy=fedit train.epochs=2 experiment=paper train.epochs=4",
        "+data.files={vqa:{train:[a,b],images:c}} data.tasks=[vqa] +train.stage1={lora_lr:0.1}",
        "strategy.update_norm={action:clip} strategy.update_norm.factor=2 ++seed=4",
        "train={epochs:3} train=paper data=paper data.clients_per_task=2",
    ],
)
def test_a_configuration_is_what_hydra_itself_composes(words):
    """Values are set on a kept composition of the chosen files, and leave that as it was."""
    before = load_config("experiment=paper")
    found = load_config(words)
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        assert found == OmegaConf.to_object(compose("config", overrides=words.split()))
    assert load_config("experiment=paper seed=0") == before


def test_a_value_that_is_there_is_not_added():
    with pytest.raises(ConfigError, match=r"`train\.epochs` has a value already: remove the `\+`"):
        load_config("+train.epochs=2")
    for word in ("+train.epochs=2", "+train.lrr=1"):
        with pytest.raises(ConfigError, match=r"train\.epochs|Unknown key .*lrr"):
            from_yaml("", [word])


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().train.epochs = 7


def test_yaml_and_dict_hold_every_value():
    config = load_config("strategy.rounds=7")
    assert to_dict(config)["strategy"]["rounds"] == 7
    assert "rounds: 7" in to_yaml(config)
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(config))) == to_dict(config)


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


def test_a_removed_setting_is_ignored_where_it_had_no_effect():
    earlier = "seed: 3\ndata: {shift: {rotation: 0.0, mirrored: false}}\ntrain: {epochs: 2, "
    kept = from_yaml(earlier + "ditto: {enabled: false, weight: 0.1}}")
    assert kept == load_config("seed=3 train.epochs=2")
    with pytest.raises(ConfigError, match="ditto"):
        from_yaml(earlier + "ditto: {enabled: true, weight: 0.1}}")


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
        ("seed: 1", ["speed=2"], "no setting `speed`"),
    ],
)
def test_yaml_that_is_no_configuration_is_refused(text, overrides, words):
    with pytest.raises(ConfigError, match=words):
        from_yaml(text, overrides)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ("strategy=ffa_lora strategy.sharing.lora=A", ("strategy.sharing.lora", "lora_matrices")),
        ("model.dtype=float16 train.autocast=off", ("model.dtype", "train.autocast")),
        ("strategy=fedex_lora train.lora_matrices=B", ("strategy.lora", "train.lora_matrices")),
        ("strategy=zero_shot privacy.enabled=true", ("trained_by", "privacy.enabled")),
        ("strategy=zero_shot evaluation.enabled=false", ("trained_by", "evaluation.enabled")),
        ("strategy=zero_shot train.proximal_weight=1", ("trained_by", "proximal_weight")),
        (
            "model.attention=flash_attention_2 train.autocast=off",
            ("model.attention", "model.dtype"),
        ),
        ("strategy.client_keys=keys", ("strategy.client_keys", "absolute path")),
        ("model.revision=v1", ("model.revision", "model.path")),
        ("strategy=fedit strategy.self_weight=false", ("self_weight", "strategy.lora")),
        ("strategy=zero_shot model.sent_dtype=int8", ("trained_by=nobody", "model.sent_dtype")),
        ("strategy=zero_shot model.sent_dtype=int4", ("trained_by=nobody", "model.sent_dtype")),
        ("strategy=local model.sent_dtype=int8", ("strategy.sharing.lora", "model.sent_dtype")),
        ("strategy=local model.sent_dtype=int4", ("strategy.sharing.lora", "model.sent_dtype")),
        ("strategy=centralised strategy.min_train_nodes=3", ("pooled", "min_train_nodes")),
        ("strategy=zero_shot strategy.min_train_nodes=3", ("nobody", "min_train_nodes")),
    ],
)
def test_settings_that_cannot_go_together_are_both_named(overrides, names):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert all(name in str(caught.value) for name in names)


def test_an_absurd_number_of_examples_is_above_the_default_limit():
    assert 665_298 < load_config().strategy.max_examples < 10**7
    load_config("strategy=zero_shot model.dtype=float16 train.autocast=off")


@pytest.mark.parametrize(
    "overrides",
    [
        "strategy=local model.sent_dtype=bfloat16",
        "strategy=zero_shot model=llava-1.5-7b",
        "strategy=centralised model.sent_dtype=int8",
        "strategy.sharing.lora=none model.sent_dtype=int4",
        "strategy.stages=1 strategy.sharing.adapter=false model.sent_dtype=int4",
        "strategy=local strategy.min_train_nodes=3",
    ],
)
def test_settings_are_allowed_where_they_have_an_effect(overrides):
    load_config(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{vqa-0:0}", "`model.lora.client_ranks.vqa-0` is 0 but must be at least 1"),
        ("{vqa-0:9}", "`model.lora.client_ranks.vqa-0` is 9 but must be at most 8"),
        ("{vqa-0:4.5}", "client_ranks"),
        ("{vqa-7:4}", "`model.lora.client_ranks` is 'vqa-7' but must be one of vqa-0, vqa-1"),
        ("{vqa-0:4} strategy=fedex_lora", "`strategy.lora` is exact but must be adaptive or task"),
        ("{vqa-0:4} strategy=centralised", "`strategy.trained_by` is pooled but must be clients"),
        ("{vqa-0:4} strategy=zero_shot", "`strategy.trained_by` is nobody"),
        ("{vqa-0:4} strategy=local", "`strategy.sharing.lora` is none but must be AB"),
        ("{vqa-0:4} strategy=fedsa_lora", "`strategy.sharing.lora` is A but must be AB"),
        ("{vqa-0:4} train.lora_matrices=B", "`train.lora_matrices` is B but must be AB"),
        ("{vqa-0:4} strategy.distances=sketch", "`strategy.distances` is sketch"),
        ("{vqa-0:4} strategy=fedadam", "`strategy.server_optimizer.name` is adam"),
        ("{vqa-0:4} strategy=ditto train.epochs=2", "`train.personal.model` is whole"),
        ("{vqa-0:4} train.schedule=run", "`train.schedule` is run but must be exchange with"),
        ("{vqa-0:4} model.sent_dtype=int8", "`model.sent_dtype` is int8 but must be same or"),
    ],
)
def test_a_smaller_lora_rank_is_refused_where_it_cannot_work(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message) if "`" in message else message):
        load_config(f"+model.lora.client_ranks={overrides}")


def test_every_condition_of_a_smaller_lora_rank_names_a_setting_and_allows_its_default():
    config = load_config("+model.lora.client_ranks={vqa-0:4,vqa-1:8}")
    assert config.model.lora.client_ranks == {"vqa-0": 4, "vqa-1": 8}
    for name, allowed in SMALLER_RANK.items():
        assert attrgetter(name)(PilotConfig()) in allowed
    everyone = ",".join(f"{task}-{n}:8" for task in config.data.tasks for n in range(3))
    load_config(f"+model.lora.client_ranks={{{everyone}}} strategy=fedex_lora")  # none is smaller
