"""Runs on a Ray cluster of two machines, which are two raylets with addresses of this one's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pilot_flwr.launch.processes import MARK_VARIABLE, free_port

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "cluster.md"
BIN = Path(sys.executable).parent
DEMO = ("experiment=demo", "data.test_examples=4", "data.clients_per_task=1", "train.epochs=1")
SMALL = (*DEMO, "data.train_examples=8", "strategy.rounds=1")
LONGER = (*DEMO, "data.train_examples=400", "strategy.rounds=2")
STORE = str(100_000_000)


class Machines:
    """A cluster of two machines with one CPU each: ``127.0.0.1``, its head, and ``127.0.0.2``."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.address = f"127.0.0.1:{free_port()}"
        self.started: list[psutil.Popen] = []
        self.raylets: list[psutil.Process] = []

    def begin(self) -> None:
        port = self.address.split(":")[1]
        self._start("--head", "--port", port, "--temp-dir", str(self.temporary))
        self._start("--address", self.address, "--node-ip-address", "127.0.0.2")

    def _start(self, *options: str) -> None:
        common = ["--num-cpus", "1", "--num-gpus", "0", "--min-worker-port", "0"]
        common += ["--max-worker-port", "0", "--object-store-memory", STORE, "--block"]
        machine = psutil.Popen(
            [BIN / "ray", "start", *options, *common],
            env=environment(), cwd=self.temporary,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.started.append(machine)
        self.raylets.append(self._raylet(machine))

    @staticmethod
    def _raylet(machine: psutil.Popen) -> psutil.Process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert machine.poll() is None, "ray start has ended"
            found = [child for child in machine.children() if child.name() == "raylet"]
            if found and len(children(found[0])) >= 2:  # its two agents
                return found[0]
            time.sleep(0.2)
        raise AssertionError("ray start has started no raylet")

    def actors(self) -> list[list[str]]:
        """Titles of the simulation's processes on each machine, by their parent."""
        return [
            [title(p) for p in children(raylet) if title(p).startswith("ray::ClientAppActor")]
            for raylet in self.raylets
        ]

    def is_clean(self) -> bool:
        """Whether both machines run, and no job has actors or marked processes there."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            names = [name for machine in self.actors() for name in machine]
            ours = [p for raylet in self.raylets for p in children(raylet) if is_marked(p)]
            if not names and not ours:
                return all(alive(raylet) for raylet in self.raylets)
            time.sleep(0.2)
        return False

    def end(self) -> None:
        everything = list(self.started)
        for machine in self.started:
            everything += machine.children(recursive=True) if alive(machine) else []
        for machine in reversed(self.started):
            if alive(machine):
                machine.terminate()
        psutil.wait_procs(everything, timeout=20)
        for process in everything:
            if alive(process):
                process.kill()
        for machine in self.started:
            machine.wait(timeout=20)


def title(process: psutil.Process) -> str:
    try:
        return str((process.cmdline() or [""])[0])
    except psutil.Error:
        return ""


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.Error:
        return []


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_marked(process: psutil.Process) -> bool:
    try:
        return MARK_VARIABLE in process.environ()
    except psutil.Error:
        return False


def environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", MARK_VARIABLE)}
    return own | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"} | more


@contextmanager
def two_machines():
    temporary = Path(tempfile.mkdtemp(prefix="c", dir="/tmp")).resolve()
    machines = Machines(temporary)
    try:
        machines.begin()
        yield machines
    finally:
        machines.end()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def machines():
    with two_machines() as found:
        yield found


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "pilot-flwr", "run", *words, f"run.folder={folder}"],
        env=environment(**variables), cwd=folder.parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=550)
    assert process.returncode == 0, out
    return out


def tensors(folder: Path) -> dict[str, bytes]:
    """Each tensor file's data; its header has the run's id, which is another for every run."""
    found = {}
    for path in sorted(folder.glob("checkpoint/round-*/**/*.safetensors")):
        data = path.read_bytes()
        found[str(path.relative_to(folder))] = data[8 + int.from_bytes(data[:8], "little") :]
    return found


def outcome(folder: Path) -> tuple[str, list, dict[str, float]]:
    result = json.loads((folder / "result.json").read_text())
    return result["status"], result["failures"], result["scores"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of `LONGER` on a Ray of its own."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(start(folder, *LONGER, "simulation.cpus=2"))
    return folder


@pytest.mark.timeout(900)
def test_a_run_on_two_machines_is_the_run_on_one(machines, alone, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *LONGER, RAY_ADDRESS=machines.address)
    running: set[int] = set()

    def watch() -> None:
        while process.poll() is None:
            for number, names in enumerate(machines.actors()):
                if any(".run" in name for name in names):
                    running.add(number)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = finish(process)
    watcher.join()
    assert running == {0, 1}, "clients ran on both machines"
    assert "2 machines, CPUs 2, GPUs 0; room for 2 clients at a time" in out
    assert len(tensors(alone)) > 6
    assert tensors(folder) == tensors(alone)
    assert outcome(folder) == outcome(alone)
    assert outcome(folder)[:2] == ("completed", [])
    assert machines.is_clean()
    assert not (folder / ".flower").exists()
    assert not list(folder.glob(".probe*"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_the_cluster_running_and_clean(machines, tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, *LONGER, f"simulation.address={machines.address}")
    deadline = time.monotonic() + 300
    while not any(".run" in name for names in machines.actors() for name in names):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert machines.is_clean()


@pytest.mark.timeout(900)
def test_a_run_restarts_without_the_machine_that_died(alone, tmp_path):
    folder = tmp_path / "run"
    with two_machines() as machines:
        process = start(folder, *LONGER, RAY_ADDRESS=machines.address)
        deadline = time.monotonic() + 400
        while not (folder / "checkpoint" / "round-0001").is_dir():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        machines.raylets[1].kill()
        out = finish(process)
        assert "The Ray cluster has 1 machine now." in out
        assert alive(machines.raylets[0])
    assert tensors(folder) == tensors(alone)
    assert outcome(folder)[0] == "completed"
    assert outcome(folder)[2] == outcome(alone)[2]


SRUN = """#!/bin/bash
node= ; while [[ $1 == -* ]]; do [[ $1 == --nodelist=* ]] && node=${1#*=}; shift; done
own= ; [[ $node == 127.0.0.2 ]] && own="--node-ip-address 127.0.0.2"
[[ " $* " == *" --head "* ]] && own="--temp-dir $RAY_FOLDER"
exec "$@" $own --min-worker-port 0 --max-worker-port 0 --object-store-memory STORE
""".replace("STORE", STORE)
SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.2\\n'\n"


@pytest.mark.timeout(600)
def test_the_slurm_script_of_the_docs(tmp_path):
    """Word by word; stand-ins for SLURM's own two programs start both steps on this machine."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "pilot.sbatch").write_text(script)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/activate").write_text(f"PATH={tmp_path}:{BIN}:$PATH\n")
    temporary = Path(tempfile.mkdtemp(prefix="c", dir="/tmp")).resolve()
    variables = {
        "PILOT_ENV": str(tmp_path / "env"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_PORT": str(free_port()),
        "RAY_FOLDER": str(temporary),
    }
    try:
        done = subprocess.run(
            ["bash", "pilot.sbatch", *SMALL],
            env=environment(**variables), cwd=tmp_path, capture_output=True, text=True,
            timeout=500, check=False,
        )  # fmt: skip
    finally:
        listed = psutil.process_iter(["cmdline"])  # a zombie's is None
        left = [p for p in listed if str(temporary) in " ".join(p.info["cmdline"] or [])]
        for process in left:
            process.kill()
        shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 machines, CPUs 2, GPUs 0; room for 2 clients at a time" in done.stdout
    assert outcome(tmp_path / "outputs" / "4711")[:2] == ("completed", [])
    assert [p.pid for p in left] == []
