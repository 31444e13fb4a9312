"""Run the app on an existing SuperLink, and follow it to completion.

The run folder is on the SuperLink's machine, usually another one, so progress and outcome come from
the ServerApp's log (`pilot_flwr.server.event_recorder`). A run has succeeded if Flower reports
``finished:completed`` and the last result in the log has no failures. Stopping this command, by
Ctrl-C or a lost connection, does not stop the run.
"""

import os
import subprocess
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pilot_flwr.errors import ConfigError
from pilot_flwr.formatting import human_seconds, plain
from pilot_flwr.launch.flower_cli import FlowerCLI, app_folder, flower_environment
from pilot_flwr.launch.processes import Interrupted, ProcessSandbox, StopSignals
from pilot_flwr.run.outcome import Outcome, RunResult, evaluate_result
from pilot_flwr.run.progress import LineTail
from pilot_flwr.server.event_recorder import is_alarm, read_announcement

QUERY_SECONDS = 60.0
RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class RemoteRun:
    """A run on a SuperLink: Flower's id and the connection's name."""

    id: str
    connection: str

    @property
    def resume_hint(self) -> str:
        """How to follow or stop the run after this command has ended."""
        return (
            f"The run continues without this command. To follow it:\n"
            f"    flwr log {self.id} {self.connection} --stream\n"
            f"To stop it:\n"
            f"    flwr stop {self.id} {self.connection}"
        )


class Detached(Interrupted):
    """A signal ended this command; the run continues."""

    def __init__(self, signum: int, run: RemoteRun) -> None:
        super().__init__(signum)
        self.run = run


def find_connection(name: str, environment: Mapping[str, str]) -> str:
    """Return the address of a connection of Flower's ``config.toml``.

    Raises `ConfigError` if the name is missing or refers to a local simulation.
    """
    path = _flower_home(environment) / "config.toml"
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
            f"`--superlink` is {name!r}, which {path} defines as a local simulation, not as a "
            "SuperLink's address; for a simulation omit `--superlink`."
        )
    return address


def run_remotely(
    overrides: str,
    connection: str,
    *,
    out: Callable[[str], None],
    verbose: bool = False,
) -> tuple[Outcome, RunResult | None]:
    """Submit a run to a SuperLink and follow it to completion.

    Returns the outcome and the ServerApp's result, None if it did not report one. A signal raises
    `Detached` and leaves it running.
    """
    with StopSignals() as signals, ProcessSandbox() as sandbox:
        home = Path(os.path.abspath(_flower_home(os.environ)))
        environment = flower_environment(os.environ, home)
        flower = FlowerCLI(sandbox, signals, environment, connection)
        run = RemoteRun(flower.submit(app_folder(sandbox.folder), overrides), connection)
        out(f"Run {run.id} on {connection}; `flwr stop {run.id} {connection}` stops it.")
        try:
            return _follow(flower, run, out, verbose)
        except Interrupted as stop:
            raise Detached(stop.signum, run) from None


def _follow(
    flower: FlowerCLI, run: RemoteRun, out: Callable[[str], None], verbose: bool
) -> tuple[Outcome, RunResult | None]:
    """Print the log until Flower reports that the run has finished.

    The log stream ends with the run or with the connection. In the latter case it is restarted and
    printed from where it broke, until `PATIENCE_SECONDS` after the SuperLink's last answer.
    """
    log = _Log(flower.sandbox.folder / "log", out, verbose)
    stream: subprocess.Popen[bytes] | None = None
    asked = answered = time.monotonic()
    while True:
        if stream is None:
            stream = flower.stream_log(run.id, log.path)
        flower.pause()
        log.show()
        now = time.monotonic()
        ended = stream.poll() is not None
        if not ended and now - asked < QUERY_SECONDS:
            continue
        status = flower.status(run.id)
        asked = time.monotonic()
        if status.finished:
            log.finish(flower, run)
            whole = f"Full log: flwr log {run.id} {run.connection} --show"
            return evaluate_result(status, log.result, whole), log.result
        answered = asked if status.status else answered
        if asked - answered > PATIENCE_SECONDS:
            reason = f"The SuperLink has not answered for {human_seconds(asked - answered)}."
            return Outcome(False, (reason, run.resume_hint)), log.result
        if ended:
            flower.pause(RETRY_SECONDS)
            stream = None


class _Log:
    """Print the ServerApp's log from a growing file."""

    def __init__(self, path: Path, out: Callable[[str], None], verbose: bool) -> None:
        self.path = path
        self.result: RunResult | None = None
        self._out, self._verbose = out, verbose
        self._tail = LineTail(path)

    def show(self) -> None:
        """Print new lines and keep the last result."""
        for line in self._tail.read():
            message = read_announcement(line)
            if isinstance(message, RunResult):
                self.result = message
            elif isinstance(message, str):
                self._out(message)
            elif self._verbose or is_alarm(line):
                self._out(plain(line))

    def finish(self, flower: FlowerCLI, run: RemoteRun) -> None:
        """Fetch the complete log of a finished run and print what the stream missed."""
        path = flower.sandbox.folder / "whole"
        complete = flower.wait(flower.stream_log(run.id, path)) == 0
        if complete and path.stat().st_size >= self.path.stat().st_size:
            self.path.write_bytes(path.read_bytes())
        self.show()


def _flower_home(environment: Mapping[str, str]) -> Path:
    home = environment.get("FLWR_HOME")
    return Path(home) if home else Path.home() / ".flwr"
