"""Every shipped method (conf/strategy/*.yaml) as a whole run, and its documentation page."""

import re
from pathlib import Path

import pytest

from pilot_flwr.config.loading import config_folder, load_config, to_dict
from tests.inprocess import TWO_TASKS, Federation

METHODS = sorted(file.stem for file in (config_folder() / "strategy").glob("*.yaml"))


CONNECTOR = {"strategy.stages": 1, "model.client_adapter": False}
TRAINED = CONNECTOR | {"train.clipping": "global"}
FEDIT = TRAINED | {"strategy.adapters": "global", "strategy.lora": "global"}
DIFFERENCES = {
    "pilot": {},
    "zero_shot": CONNECTOR | {"strategy.trained_by": "nobody"},
    "local": TRAINED | {"strategy.sharing.adapter": False, "strategy.sharing.lora": "none"},
    "centralised": FEDIT | {"strategy.trained_by": "pooled"},
    "fedit": FEDIT,
    "fedavg_per_task": TRAINED | {"strategy.lora": "task"},
    "fedprox": FEDIT | {"train.proximal_weight": 0.01},
    "fedadam": FEDIT
    | {
        "strategy.server_optimizer.name": "adam",
        "strategy.server_optimizer.learning_rate": 0.01,
        "strategy.server_optimizer.beta_1": 0.9,
        "strategy.server_optimizer.beta_2": 0.99,
        "strategy.server_optimizer.tau": 1e-3,
    },
    "ffa_lora": FEDIT | {"strategy.sharing.lora": "B", "train.lora_matrices": "B"},
    "fedsa_lora": FEDIT | {"strategy.sharing.lora": "A"},
    "fedex_lora": FEDIT | {"strategy.lora": "exact"},
    "ditto": FEDIT | {"train.personal.model": "whole", "train.personal.pull": 0.1},
    "feddpa": FEDIT
    | {
        "train.personal.model": "beside",
        "train.personal.share": 0.5,
        "train.personal.weighting": "similarity",
        "train.personal.instances": 5,
    },
    "feddat": FEDIT
    | {
        "train.personal.model": "beside",
        "train.personal.share": 0.5,
        "train.personal.distillation": 1.0,
        "train.personal.temperature": 3.0,
    },
    "pilot_no_difference_loss": {"train.difference_loss.weight": 0.0},
    "pilot_no_client_adapter": {"model.client_adapter": False},
    "pilot_stage1_only": {"strategy.stages": 1},
    "pilot_no_cross_task_adapters": {"model.cross_task_adapters": False},
    "pilot_no_router_losses": {"train.balance_weight": 0.0, "train.z_weight": 0.0},
    "pilot_fedavg_lora": {"strategy.lora": "global"},
    "pilot_global_adapters": {"strategy.adapters": "global"},
    "pilot_official_init": {"model.initialisation": "official"},
    "pilot_m1": {"strategy.num_neighbors": 1},
    "pilot_all_neighbors": {"strategy.num_neighbors": 1_000_000},
    "pilot_no_self_weight": {"strategy.self_weight": False},
    "pilot_auto": {"strategy.neighbors": "grouped"},
}
"""Method → settings that differ from Pilot's: docs/reference/methods.md, written down again."""
DEFAULTS_TOO = ("strategy.server_optimizer.", "train.personal.")
"""What a file may say although it is the default: it is part of the method."""


@pytest.mark.parametrize("experiment", ["demo", "emoji"])  # both set `train` as well
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_settings_and_no_others(method, experiment):
    pilot, mine = (
        flat(to_dict(load_config(f"experiment={experiment} strategy={name}")))
        for name in ("pilot", method)
    )
    assert mine["strategy.name"] == method
    differing = {key: mine[key] for key in mine if mine[key] != pilot[key]}
    assert differing.pop("strategy.name", "pilot") == method
    same = {key for key, value in DIFFERENCES[method].items() if pilot[key] == value}
    assert differing == {k: v for k, v in DIFFERENCES[method].items() if k not in same}
    assert all(key.startswith(DEFAULTS_TOO) for key in same)


def flat(settings, prefix=""):
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(tmp_path: Path, method):
    federation = Federation(tmp_path, f"{TWO_TASKS} train.epochs=2 strategy={method}").run()
    assert federation.events("failure") == []


def test_the_page_has_every_method_and_no_other():
    text = (config_folder().parent / "docs" / "reference" / "methods.md").read_text(
        encoding="utf-8"
    )
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)]
    assert sorted(names) == METHODS
