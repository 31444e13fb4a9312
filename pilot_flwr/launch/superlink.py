"""The SuperLinks that the user's Flower knows: the connections of its ``config.toml``.

Run the app on a SuperLink that is already there, and follow it to its end from here.

Nothing is started but Flower's command line. The run folder is on the SuperLink's machine, usually
another one, so progress and verdict come from the ServerApp's log
(`pilot_flwr.server.event_recorder`). A run that ends well says ``finished:completed`` to Flower and
a verdict without failures in its log. What ends this command, Ctrl-C or a lost connection, does not
end the run.
"""

import json
import os
import subprocess
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot_flwr.config.overrides import toml_string
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.formatting import human_seconds, plain
from pilot_flwr.launch.processes import Interrupted, ProcessSandbox, StopSignals
from pilot_flwr.launch.simulation import flower_program
from pilot_flwr.run.outcome import COMPLETED, Outcome, RunStatus
from pilot_flwr.run.progress import LineTail
from pilot_flwr.server import event_recorder as announcements
from pilot_flwr.server.event_recorder import Announcement


def find_connection(name: str, environment: Mapping[str, str]) -> str:
    """Return the address of a connection of Flower's ``config.toml``.

    Raises
    ------
    ConfigError
        The file has no such connection, or it is one of Flower's local simulations.
    """
    home = environment.get("FLWR_HOME")
    path = (Path(home) if home else Path.home() / ".flwr") / "config.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except FileNotFoundError:
        table = {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    found = {key: row for key, row in table.items() if isinstance(row, dict)}
    if name not in found:
        names = ", ".join(sorted(found)) or "none"
        raise ConfigError(
            f"`--superlink` is {name!r} but {path} has no [superlink.{name}]; it has: {names}."
        )
    address = str(found[name].get("address", ""))
    if not address or address.startswith(":"):
        raise ConfigError(
            f"`--superlink` is {name!r}, which in {path} is no SuperLink but a simulation here; "
            "for that leave `--superlink` out."
        )
    return address


TICK_SECONDS = 0.3
QUERY_SECONDS = 60.0
ANSWER_SECONDS = 300.0
PATIENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class RemoteRun:
    """A run on a SuperLink: Flower's id and the connection's name."""

    id: str
    connection: str

    @property
    def resume_hint(self) -> str:
        """How to follow and stop a run that this command has left."""
        return (
            f"The run goes on without this command. To follow it:\n"
            f"    flwr log {self.id} {self.connection} --stream\n"
            f"To stop it:\n"
            f"    flwr stop {self.id} {self.connection}"
        )


class Detached(Interrupted):
    """The command was told to stop; the run goes on.

    Parameters
    ----------
    signum : int
        The signal that said so.
    run : RemoteRun
        What goes on.
    """

    def __init__(self, signum: int, run: RemoteRun) -> None:
        super().__init__(signum)
        self.run = run


def run_remotely(
    app: Path,
    overrides: str,
    connection: str,
    *,
    out: Callable[[str], None],
    verbose: bool = False,
) -> tuple[Outcome, Announcement | None]:
    """Submit a Flower app to a SuperLink and follow it to its end.

    Parameters
    ----------
    app : Path
        Folder of the app's pyproject.toml.
    overrides : str
        The app's run config value `overrides`.
    connection : str
        Name in Flower's ``config.toml``.
    out : callable
        Takes the lines of the live output.
    verbose : bool
        Show the whole log of the ServerApp.

    Returns
    -------
    Outcome
        Whether the run succeeded, and why not.
    Announcement or None
        What the ServerApp said last, if it reached its end.

    Raises
    ------
    RunError
        The run was not accepted.
    Detached
        A signal said stop; the run goes on.
    """
    with StopSignals() as signals, ProcessSandbox() as workplace:
        flower = _CommandLine(workplace, signals)
        run = RemoteRun(flower.submit(app, overrides, connection), connection)
        out(f"Run {run.id} on {connection}; `flwr stop {run.id} {connection}` stops it.")
        try:
            return _follow(flower, run, out, verbose)
        except Interrupted as stop:
            raise Detached(stop.signum, run) from None


def _follow(
    flower: "_CommandLine", run: RemoteRun, out: Callable[[str], None], verbose: bool
) -> tuple[Outcome, Announcement | None]:
    """Show the log until Flower says that the run has finished.

    The log's stream ends with the run, or when the connection does: then it is asked for anew and
    shown from where it was, until `PATIENCE_SECONDS` after the SuperLink's last answer.
    """
    log = _Log(flower.workplace.folder / "log", out, verbose)
    stream: subprocess.Popen[bytes] | None = None
    asked = answered = time.monotonic()
    while True:
        if stream is None:
            stream = flower.stream_log(run, log.path)
        flower.pause()
        log.show()
        now = time.monotonic()
        ended = stream.poll() is not None
        if not ended and now - asked < QUERY_SECONDS:
            continue
        status = flower.status(run)
        asked = time.monotonic()
        if status.finished:
            log.finish(flower, run)
            return evaluate_outcome(status, log.verdict, run), log.verdict
        answered = asked if status.status else answered
        if asked - answered > PATIENCE_SECONDS:
            gone = f"The SuperLink has not answered for {human_seconds(asked - answered)}."
            return Outcome(False, (gone, run.resume_hint)), log.verdict
        if ended:
            flower.pause(5.0)
            stream = None


def evaluate_outcome(status: RunStatus, verdict: Announcement | None, run: RemoteRun) -> Outcome:
    """Decide from Flower's status and the ServerApp's verdict whether a run can be trusted."""
    if status.status == COMPLETED and verdict is not None and verdict.succeeded:
        return Outcome(succeeded=True)
    lines: list[str] = []
    if verdict is None:
        lines.append("The ServerApp's log has no verdict: it did not reach its end.")
    else:
        lines += verdict.reasons
        if verdict.failures > len(verdict.reasons):
            lines.append(f"... and {verdict.failures - len(verdict.reasons)} more failures.")
        lines += [verdict.error] if verdict.error else []
    if status.status != COMPLETED:
        lines.append(f"Flower's status of the run: {status.status or 'unknown'}.")
        if status.details not in ("", "N/A") and verdict is None:
            lines.append(status.details)
    lines.append(f"Full log: flwr log {run.id} {run.connection} --show")
    return Outcome(False, tuple(dict.fromkeys(lines)))


class _Log:
    """The ServerApp's log as it grows in a file."""

    def __init__(self, path: Path, out: Callable[[str], None], verbose: bool) -> None:
        self.path = path
        self.verdict: Announcement | None = None
        self._out, self._verbose = out, verbose
        self._tail = LineTail(path)

    def show(self) -> None:
        """Print what is new; the last verdict counts."""
        for line in self._tail.read():
            said = announcements.read(line)
            if isinstance(said, Announcement):
                self.verdict = said
            elif isinstance(said, str):
                self._out(said)
            elif self._verbose or announcements.is_alarm(line):
                self._out(plain(line))

    def finish(self, flower: "_CommandLine", run: RemoteRun) -> None:
        """Print what was written after the stream broke off, once the run has finished."""
        whole = flower.whole_log(run)
        if whole is not None and len(whole) >= self.path.stat().st_size:
            self.path.write_bytes(whole)
        self.show()


class _CommandLine:
    """Flower's command line, with the user's own connections."""

    def __init__(self, workplace: ProcessSandbox, signals: StopSignals) -> None:
        self.workplace = workplace
        self._signals = signals
        programs = str(flower_program("flwr").parent)
        self._environment = {
            **os.environ,
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
            "FLWR_HOME": os.path.abspath(os.environ.get("FLWR_HOME") or Path.home() / ".flwr"),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def submit(self, app: Path, overrides: str, connection: str) -> str:
        """Submit the app and return Flower's id of the run."""
        config = f"overrides={toml_string(overrides)}"
        answer = self._ask("run", str(app), connection, "--run-config", config)
        if not answer.get("success") or not answer.get("run-id"):
            reason = answer.get("error-message") or answer.get("error") or "no reason given"
            raise RunError(f"The SuperLink did not accept the run: {str(reason).strip()}")
        return str(answer["run-id"])

    def status(self, run: RemoteRun) -> RunStatus:
        """Ask for the run's status; unknown if the SuperLink does not answer."""
        runs = self._ask("list", run.connection, "--run-id", run.id).get("runs")
        row = runs[0] if isinstance(runs, list) and runs else {}
        return RunStatus(str(row.get("status", "")), str(row.get("status-details", "")))

    def stream_log(self, run: RemoteRun, path: Path) -> subprocess.Popen[bytes]:
        """Write the run's log into a file, from its beginning, as it grows."""
        return self._spawn(["log", run.id, run.connection, "--stream"], path)

    def whole_log(self, run: RemoteRun) -> bytes | None:
        """Return the log of a finished run; its stream ends by itself."""
        path = self.workplace.folder / "whole"
        child = self._spawn(["log", run.id, run.connection, "--stream"], path)
        return path.read_bytes() if self._wait(child) == 0 else None

    def pause(self, seconds: float = TICK_SECONDS) -> None:
        """Wait; a signal ends it."""
        deadline = time.monotonic() + seconds
        while True:
            self._signals.check()
            if (rest := deadline - time.monotonic()) <= 0:
                return
            time.sleep(min(rest, TICK_SECONDS))

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command and return its JSON answer."""
        path = self.workplace.folder / "answer"
        self._wait(self._spawn([*arguments, "--format", "json"], path))
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            return parsed
        return {"success": False, "error": text or f"`flwr {arguments[0]}` gave no answer"}

    def _spawn(self, arguments: list[str], path: Path) -> subprocess.Popen[bytes]:
        with path.open("wb") as stdout:
            return self.workplace.spawn(
                [str(flower_program("flwr")), *arguments],
                self._environment,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
            )

    def _wait(self, child: subprocess.Popen[bytes]) -> int | None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while child.poll() is None and time.monotonic() < deadline:
            self.pause()
        return child.poll()
