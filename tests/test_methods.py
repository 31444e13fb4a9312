"""Every method that ships, as a whole run: conf/strategy/*.yaml, and the page about them."""

import re
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


def test_the_page_has_every_method_and_no_other():
    text = (config_folder().parent / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)]
    assert sorted(names) == METHODS
