"""A wheel in an empty environment: demo, sweep, Flower's simulation, SuperLink; no checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import psutil
import pytest
from flowerlab import nothing_left

from pilot_flwr.launch.processes import free_port, listens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.train_examples=8",
    "data.test_examples=2",
    "data.clients_per_task=1",
    "train.epochs=1",
    "strategy.rounds=1",
    "evaluation.max_new_tokens=2",
    "run.report=false",
)
IN_PROCESS = "simulation.engine=in-process"


class Installation:
    """An environment with the wheel; the dependencies are those of the present one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "NO_PROXY": "127.0.0.1",
        }
        self.cwd = folder / "elsewhere"
        self.cwd.mkdir()

    def install(self) -> None:
        build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", self.folder, ROOT]
        subprocess.run([sys.executable, *build], check=True, capture_output=True)
        venv.create(self.bin.parent)
        (wheel,) = self.folder.glob("*.whl")
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, env=self.environment)
        (packages,) = self.bin.parent.glob("lib/python*/site-packages")
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for script in Path(sysconfig.get_path("scripts")).glob("fl*"):  # flwr's programs
            copy = self.bin / script.name
            code = script.read_text().partition("\n")[2]
            copy.write_text(f"#!{self.bin / 'python'}\n{code}")
            copy.chmod(0o755)

    def pilot_flwr(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [self.bin / "pilot-flwr", *words],
            cwd=self.cwd, env=self.environment, capture_output=True, text=True, timeout=500,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    found = Installation(tmp_path_factory.mktemp("wheel"))
    found.install()
    return found


def test_the_package_is_the_wheels(installed):
    program = "import pilot_flwr; print(pilot_flwr.__file__)"
    python = [installed.bin / "python", "-c", program]
    found = subprocess.check_output(python, cwd=installed.cwd, env=installed.environment, text=True)
    package = Path(found.strip()).parent
    assert package.is_relative_to(installed.bin.parent)
    assert (package / "py.typed").is_file() and (package / "conf" / "config.yaml").is_file()


def completed(folder: Path) -> dict[str, float]:
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["failures"]) == ("completed", [])
    return result["scores"]


@pytest.fixture(scope="module")
def demo(installed):
    installed.pilot_flwr("run", "experiment=demo", *SMALL, IN_PROCESS, "run.folder=demo")
    return completed(installed.cwd / "demo")


def test_both_engines_run_the_demo(installed, demo, monkeypatch):
    """Flower's engine runs the app assembled from the package, which is gone afterwards."""
    with nothing_left(monkeypatch) as scratch:
        installed.environment["RAY_TMPDIR"] = str(scratch)
        installed.pilot_flwr("run", "experiment=demo", *SMALL, "run.folder=flower")
    assert completed(installed.cwd / "flower") == demo


def test_a_sweep(installed, demo):
    words = ("experiment=demo", *SMALL, IN_PROCESS, "seed=0,1")
    installed.pilot_flwr("sweep", *words, "--out", "sweep")
    results = (installed.cwd / "sweep" / "results.csv").read_text()
    assert results.count(",done,") == 2


def test_a_superlink_gets_the_app_and_runs_its_server(installed):
    """Without sites the ServerApp, from the submitted bundle, ends with an error of its own."""
    port = free_port()
    home = Path(installed.environment["FLWR_HOME"])
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.pilot]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    program = [installed.bin / "flower-superlink", "--insecure", "--host", "127.0.0.1"]
    with (installed.folder / "superlink.log").open("wb") as log:
        superlink = psutil.Popen(
            [*program, "--port", str(port)],
            cwd=installed.cwd, env=installed.environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        while not listens(superlink.pid, port):
            assert superlink.poll() is None, log.read_text()
        said = installed.pilot_flwr(
            "run", "--superlink", "pilot", *SMALL, "strategy.wait_seconds=1",
            f"run.folder={installed.folder}/remote", code=1,
        )  # fmt: skip
    finally:
        for process in [*superlink.children(recursive=True), superlink]:
            process.kill()
        superlink.wait()
    assert " on pilot; `flwr stop " in said
    result = json.loads((installed.folder / "remote" / "result.json").read_text())
    assert result["status"] == "failed" and result["error"] in said
