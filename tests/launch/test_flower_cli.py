"""The app that is handed to Flower: the checkout, or the same files from an installed package."""

import shutil
import tomllib
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from pilot_flwr.cli.main import main
from pilot_flwr.errors import RunError
from pilot_flwr.launch import flower_cli
from pilot_flwr.launch.flower_cli import app_folder, flower_program
from pilot_flwr.run import provenance

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package as a wheel installs it, with compiled files beside its own."""
    package = tmp_path / "site-packages" / "pilot_flwr"
    shutil.copytree(ROOT / "pilot_flwr", package)
    shutil.copytree(ROOT / "conf", package / "conf")
    shutil.copy(ROOT / "pyproject.toml", package)
    monkeypatch.setattr(flower_cli, "__file__", str(package / "launch" / "flower_cli.py"))
    return package


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_in_a_checkout_the_app_is_the_checkout(tmp_path):
    assert app_folder(tmp_path) == ROOT
    assert list(tmp_path.iterdir()) == []


def test_an_installed_package_gives_the_checkouts_files(installed, tmp_path):
    app = app_folder(tmp_path / "scratch")
    assert files(app / "pilot_flwr") == files(ROOT / "pilot_flwr")
    assert files(app / "conf") == files(ROOT / "conf")
    assert not list(app.rglob("__pycache__"))
    one, other = (tomllib.loads((f / "pyproject.toml").read_text()) for f in (app, ROOT))
    del other["tool"]["flwr"]["app"]["fab-exclude"]
    assert one == other


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_bundle_and_code_hash_do_not_depend_on_the_installation(installed, tmp_path, monkeypatch):
    apps = [app_folder(tmp_path / name) for name in ("one", "two")]
    assert build_fab_from_disk(apps[0]) == build_fab_from_disk(apps[1])
    module = apps[0] / "pilot_flwr" / "run" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(module))
    monkeypatch.setattr(provenance, "config_folder", lambda: apps[0] / "conf")
    hashed = provenance.code_hash.__wrapped__()
    monkeypatch.undo()
    assert hashed == provenance.code_hash.__wrapped__()


def test_a_package_without_pyproject_toml_is_an_error(installed, tmp_path):
    (installed / "pyproject.toml").write_text("[tool.other]\n")
    with pytest.raises(
        RunError, match=f"{installed.parent} nor {installed} .*reinstall pilot-flwr"
    ):
        app_folder(tmp_path / "scratch")
    (installed.parent / "pyproject.toml").write_text("[tool.flwr.app.components]\n")
    with pytest.raises(RunError, match="contains a Flower app.s pyproject.toml"):
        app_folder(tmp_path / "scratch")


def test_a_broken_installation_leaves_no_run_folder(installed, tmp_path, monkeypatch, capsys):
    where = tmp_path / "here"
    where.mkdir()
    monkeypatch.chdir(where)
    (installed / "pyproject.toml").unlink()
    assert main(["run", "run.folder=run"]) == 1
    assert "reinstall pilot-flwr" in capsys.readouterr().err
    assert main(["sweep", "seed=0,1", "--out", "sweep"]) == 2
    assert "reinstall pilot-flwr" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(where)
    monkeypatch.setattr(flower_cli.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(flower_cli.sys, "executable", str(tmp_path / "python"))
    assert main(["run", "run.folder=run"]) == 1
    assert "`flwr` is not installed" in capsys.readouterr().err
    assert list(where.iterdir()) == []


def test_a_missing_program_is_named():
    with pytest.raises(RunError, match="`no-such-program` is not installed beside"):
        flower_program("no-such-program")
