"""Every method that ships, as a whole run: conf/strategy/*.yaml."""

from pathlib import Path

import pytest

from pilot_flwr.config import config_folder, load_config
from tests.inprocess import TWO_TASKS, Federation

METHODS = sorted(file.stem for file in (config_folder() / "strategy").glob("*.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_file_has_its_name(method):
    assert load_config(f"strategy={method}").strategy.name == method


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(tmp_path: Path, method):
    federation = Federation(tmp_path, f"{TWO_TASKS} train.epochs=2 strategy={method}").run()
    assert federation.events("failure") == []
