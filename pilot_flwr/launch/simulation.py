"""Run the app under Flower's simulation engine so that its outcome can be trusted.

``flwr run`` alone does not tell: it returns 0 when the run failed, leaves a SuperLink behind
that keeps the first run's environment, and installs the app's dependencies anew. So `launch`
starts a SuperLink of its own in a neutral folder, submits the app, follows log and status,
notices when a process dies, and leaves none behind. What counts as success is in
`pilot_flwr.run.outcome`; Flower is used through its command line only.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from psutil import Process  # type: ignore[import-untyped, unused-ignore]

from pilot_flwr.config.overrides import toml_string
from pilot_flwr.errors import RunError
from pilot_flwr.formatting import count
from pilot_flwr.launch.processes import ProcessSandbox, StopSignals, free_port, is_alive, listens
from pilot_flwr.launch.ray_cluster import ADDRESS_VARIABLE, flower_home, look_at, ray_environment
from pilot_flwr.run.outcome import Outcome, RunStatus, evaluate_outcome
from pilot_flwr.run.progress import ProgressPrinter

CONNECTION = "pilot"
TICK_SECONDS = 0.3
QUERY_SECONDS = 30.0
START_SECONDS = 120.0
FINISH_SECONDS = 120.0


def flower_environment(scratch: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of Flower's processes: the user's, made safe and quiet.

    Flower starts its own helpers by name, hence the folder of its programs first in ``PATH``.
    """
    local = ",".join(filter(None, [base.get("NO_PROXY") or base.get("no_proxy"), "127.0.0.1"]))
    return {
        "RAY_DEDUP_LOGS": "0",
        **{name: value for name, value in base.items() if name != ADDRESS_VARIABLE},
        "PATH": os.pathsep.join([str(flower_program("flwr").parent), base.get("PATH", os.defpath)]),
        "NO_PROXY": local,
        "no_proxy": local,
        "PYTHONUNBUFFERED": "1",
        "FLWR_HOME": str(scratch / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def launch(
    app: Path,
    overrides: str,
    federation: str,
    folder: Path,
    *,
    out: Callable[[str], None],
    verbose: bool = False,
    address: str = "",
    resumed: bool = False,
) -> Outcome:
    """Run a Flower app to its end.

    Parameters
    ----------
    app : Path
        Folder of the app's pyproject.toml.
    overrides : str
        The app's run config value `overrides`, `run.folder` included.
    federation : str
        From `pilot_flwr.config.overrides.federation_config`.
    folder : Path
        Absolute run folder; the app writes ``metrics.jsonl`` and ``result.json`` there.
    out : callable
        Takes the lines of the live output.
    verbose : bool
        Show Flower's own log as well.
    address : str
        ``HOST:PORT`` of an existing Ray cluster to run on; empty starts a Ray of its own.
    resumed : bool
        The run folder holds a run that goes on: what it recorded before is not shown again.

    Returns
    -------
    Outcome
        Whether the run succeeded, and why not.

    Raises
    ------
    RunError
        The run could not be started.
    Interrupted
        A signal said stop; everything has been ended.
    """
    if address and resumed:  # perhaps a machine has died: wait until Ray knows which are left
        found = look_at(address, folder)
        out(f"The Ray cluster has {count(len(found.nodes), 'machine')} now.")
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    narrator = ProgressPrinter(
        folder / "metrics.jsonl", logs / "flower.log" if verbose else None, out
    )
    with flower_home(folder), StopSignals() as signals, ProcessSandbox() as workplace:
        environment = flower_environment(workplace.folder, os.environ)
        if address:
            environment |= ray_environment(address, folder, workplace.mark, os.environ)
        flower = _Flower(workplace, logs, signals, environment)
        flower.start()
        run = flower.submit(app, overrides, federation)
        if resumed:
            narrator.begin_with(run)
        status = flower.follow(run, narrator, folder / "result.json")
        narrator.finish()
        outcome = evaluate_outcome(status, folder)
        if not outcome.succeeded:
            _keep_ray_logs(workplace.folder, logs / "ray")
    return outcome


class _Flower:
    """A SuperLink of our own, and Flower's command line pointed at it."""

    def __init__(
        self,
        workplace: ProcessSandbox,
        logs: Path,
        signals: StopSignals,
        environment: dict[str, str],
    ) -> None:
        self._workplace = workplace
        self._logs = logs
        self._signals = signals
        self._environment = environment
        self._superlink: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the SuperLink and wait until it answers."""
        for _ in range(3):  # somebody may take the port between our look and its start
            port = free_port()
            superlink = self._spawn_superlink(port)
            deadline = time.monotonic() + START_SECONDS
            while superlink.poll() is None and time.monotonic() < deadline:
                self._pause()
                if listens(superlink.pid, port) and _healthy(port):
                    self._superlink = superlink
                    self._write_connection(port)
                    return
        raise RunError(
            f"Flower's SuperLink did not start; its log is {self._logs / 'superlink.log'}."
        )

    def submit(self, app: Path, overrides: str, federation: str) -> str:
        """Submit the app and return Flower's id of the run."""
        config = f"overrides={toml_string(overrides)}"
        options = ["--run-config", config, "--federation-config", federation]
        answer = self._ask("run", str(app), CONNECTION, *options)
        if not answer.get("success") or not answer.get("run-id"):
            reason = answer.get("error-message") or answer.get("error") or "no reason given"
            raise RunError(f"Flower did not accept the app in {app}: {reason}")
        return str(answer["run-id"])

    def status(self, run: str) -> RunStatus:
        """Ask for the run's status; unknown if the SuperLink is gone."""
        assert self._superlink is not None
        if self._superlink.poll() is not None:
            return RunStatus("")
        answer = self._ask("list", CONNECTION, "--run-id", run)
        runs = answer.get("runs")
        row = runs[0] if isinstance(runs, list) and runs else {}
        return RunStatus(str(row.get("status", "")), str(row.get("status-details", "")))

    def follow(self, run: str, narrator: ProgressPrinter, result: Path) -> RunStatus:
        """Show the run's progress until it has finished, or cannot finish any more.

        Asking for the status costs a second of CPU, so it is done when there is a reason: the
        log has ended, something has died, or half a minute has passed.
        """
        started = asked = time.monotonic()
        simulation: Process | None = None
        result_seen: float | None = None
        log: subprocess.Popen[bytes] | None = self._stream_log(run)
        while True:
            self._pause()
            narrator.show()
            now = time.monotonic()
            simulation = simulation or self._workplace.find("flwr-simulation")
            if result_seen is None and result.exists():
                result_seen = now
            problem = self._problem(simulation, now - started, now - (result_seen or now))
            log_ended = log is not None and log.poll() is not None
            if problem or log_ended or now - asked > QUERY_SECONDS:
                status = self.status(run)
                asked = now
                if status.finished:
                    return status
                if problem:
                    return RunStatus(status.status, problem, lost=self._lost(simulation))
                log = None if log_ended else log or self._stream_log(run)

    def _lost(self, simulation: Process | None) -> bool:
        """Tell whether a process has gone that the run needs."""
        assert self._superlink is not None
        gone = simulation is not None and not is_alive(simulation)
        return gone or self._superlink.poll() is not None

    def _problem(self, simulation: Process | None, running: float, since_result: float) -> str:
        """Say why the run will not finish by itself, or nothing."""
        assert self._superlink is not None
        if self._superlink.poll() is not None:
            return (
                f"Flower's SuperLink ended with code {self._superlink.returncode} during the run; "
                f"its log is {self._logs / 'superlink.log'}."
            )
        if simulation is None and running > START_SECONDS:
            return f"Flower did not start the simulation within {START_SECONDS:.0f} s."
        if self._lost(simulation):
            return (
                "The simulation's process ended without a word to Flower: it was killed "
                "(out of memory?), crashed, or left by os._exit."
            )
        if since_result > FINISH_SECONDS:
            return f"Flower did not end the run within {FINISH_SECONDS:.0f} s of its result."
        return ""

    def _spawn_superlink(self, port: int) -> subprocess.Popen[bytes]:
        command = [str(flower_program("flower-superlink")), "--insecure", "--simulation"]
        command += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
        with (self._logs / "superlink.log").open("ab") as log:
            return self._workplace.spawn(
                command, self._environment, stdout=log, stderr=subprocess.STDOUT
            )

    def _write_connection(self, port: int) -> None:
        home = Path(self._environment["FLWR_HOME"])
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )

    def _stream_log(self, run: str) -> subprocess.Popen[bytes]:
        command = [str(flower_program("flwr")), "log", run, CONNECTION, "--stream"]
        with (self._logs / "flower.log").open("wb") as log:  # each stream starts from the beginning
            return self._workplace.spawn(
                command, self._environment, stdout=log, stderr=subprocess.DEVNULL
            )

    def _ask(self, *arguments: str) -> dict[str, object]:
        """Run a ``flwr`` command and return its JSON answer."""
        command = [str(flower_program("flwr")), *arguments, "--format", "json"]
        answer, complaint = (self._workplace.folder / name for name in ("answer", "complaint"))
        with answer.open("wb") as stdout, complaint.open("wb") as stderr:
            child = self._workplace.spawn(command, self._environment, stdout=stdout, stderr=stderr)
            deadline = time.monotonic() + START_SECONDS
            while child.poll() is None and time.monotonic() < deadline:
                self._pause()
        try:
            parsed = json.loads(answer.read_text(encoding="utf-8"))
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            return parsed
        text = complaint.read_text(encoding="utf-8", errors="replace").strip()
        return {"success": False, "error": text or f"`flwr {arguments[0]}` gave no answer"}

    def _pause(self) -> None:
        time.sleep(TICK_SECONDS)
        self._signals.check()


def flower_program(name: str) -> Path:
    """Return one of Flower's programs: beside the running Python, not via ``PATH``."""
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if (folder / name).is_file():
            return folder / name
    raise RunError(f"`{name}` is not installed beside {sys.executable}: `pip install -e .`.")


def _healthy(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _keep_ray_logs(scratch: Path, target: Path) -> None:
    """Copy what actors wrote: when one dies, this may be the only trace of why."""
    for source in sorted(scratch.glob("ray/session_2*/logs/worker-*")):
        if source.is_file() and source.stat().st_size:
            target.mkdir(exist_ok=True)
            shutil.copyfile(source, target / source.name)
