"""One attempt at a run: started or resumed, and killed with everything that came from it."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PHASES = ("start-up", "training", "aggregation", "checkpoint", "evaluation")
MARK = "PILOT_FLWR_FAULTS"
TICK_SECONDS = 0.001


@dataclass(frozen=True)
class Plan:
    """When to kill.

    Attributes
    ----------
    phase : str
        One of `PHASES`.
    exchange : int
        Of the phases that belong to one.
    delay : float
        Seconds after the phase has begun; for the start-up, after the launcher's start, and at the
        first event at the latest.
    """

    phase: str
    exchange: int
    delay: float

    @classmethod
    def drawn(
        cls, draw: random.Random, phase: str, done: int, exchanges: int, start_up: float
    ) -> "Plan":
        """Draw a point: an exchange that is still to come, and a delay that fits the phase."""
        if phase not in ("start-up", "evaluation") and done >= exchanges:
            phase = "evaluation"
        exchange = draw.randint(min(done + 1, exchanges), min(done + 2, exchanges))
        longest = {"start-up": start_up, "training": 0.6, "evaluation": 0.1}
        return cls(phase, exchange, draw.uniform(0, longest.get(phase, 0.02)))

    def reached(self, folder: Path, events: Sequence[dict[str, Any]]) -> bool:
        """Return whether the phase has begun."""
        if self.phase == "start-up":
            return True
        if self.phase == "checkpoint":
            return (folder / "checkpoint" / f".round-{self.exchange:04d}.tmp").exists()
        kind = {"training": "order", "aggregation": "train", "evaluation": "order"}[self.phase]
        wanted = "evaluate" if self.phase == "evaluation" else "train"
        return any(
            event["event"] == kind
            and event.get("phase", "train") == wanted
            and (self.phase == "evaluation" or event["round"] == self.exchange)
            for event in events
        )


@dataclass(frozen=True)
class Attempt:
    """One start or resumption, and how it ended.

    Attributes
    ----------
    resumed : bool
        Whether there was something to resume.
    plan : Plan or None
        When it was to be killed.
    killed, completed : bool
        How it ended; a run that ends before its kill is not killed.
    processes : int
        Killed at once.
    seconds : float
        From the launcher's start.
    seconds_to_news : float
        To the first event.
    lines : int
        Of ``metrics.jsonl`` at the end.
    """

    resumed: bool
    plan: Plan | None
    killed: bool
    completed: bool
    processes: int
    seconds: float
    seconds_to_news: float
    lines: int

    def describe(self) -> dict[str, Any]:
        """Return it in JSON types."""
        end = "killed" if self.killed else "completed" if self.completed else "failed"
        return {
            "phase": self.plan.phase if self.plan else None,
            "exchange": self.plan.exchange if self.plan else None,
            "end": end,
            "resumed": self.resumed,
            "seconds": round(self.seconds, 1),
            "processes": self.processes,
            "events": self.lines,
        }


def attempt(
    folder: Path, settings: Sequence[str], plan: Plan | None, *, log: Path, limit: float
) -> Attempt:
    """Start a run, or resume it if there is one, and kill it as planned.

    Parameters
    ----------
    folder : Path
        The run folder.
    settings : sequence of str
        Overrides of a new run.
    plan : Plan or None
        None lets it end.
    log : Path
        Gets the launcher's output.
    limit : float
        Seconds after which a run that neither ends nor comes to its kill is an error.
    """
    resumed = (folder / "overrides.txt").is_file()
    words = [f"resume={folder}"] if resumed else [*settings, f"run.folder={folder}"]
    if not resumed:
        shutil.rmtree(folder, ignore_errors=True)  # killed before it had written a word
    # Short, as Ray puts sockets there.
    scratch = Path(tempfile.mkdtemp(prefix="kf", dir="/tmp"))  # nosec B108  # a folder of its own
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "RAY_TMPDIR": str(scratch)}
    program = Path(sys.executable).parent / "pilot-flwr"
    began, told = time.monotonic(), News(folder, resumed)
    reached: float | None = None
    news: float | None = None
    try:
        with log.open("wb") as output:
            launcher = subprocess.Popen(  # nosec B603  # no shell, this package's program
                [str(program), "run", *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while launcher.poll() is None:
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            if now - began > limit:
                kill_all(mark, scratch, launcher)
                raise SystemExit(f"Nothing happened for {limit:.0f} s; see {log}.")
            events = told.events()
            news = now if news is None and events else news
            if plan is None:
                time.sleep(0.1)
                continue
            if reached is None and plan.reached(folder, events):
                reached = began if plan.phase == "start-up" else now
            late = plan.phase == "start-up" and bool(events)
            if reached is not None and (late or now - reached >= plan.delay):
                number = kill_all(mark, scratch, launcher)
                return Attempt(
                    resumed, plan, True, False, number, now - began, 0.0, len(_events(folder))
                )
        seconds = time.monotonic() - began
        return Attempt(
            resumed,
            plan,
            False,
            launcher.returncode == 0,
            0,
            seconds,
            (news or time.monotonic()) - began,
            len(_events(folder)),
        )
    finally:
        kill_all(mark, scratch, None)
        shutil.rmtree(scratch, ignore_errors=True)


def kill_all(mark: str, scratch: Path, launcher: "subprocess.Popen[bytes] | None") -> int:
    """SIGKILL the launcher and everything that came from it; return how many there were.

    Ray overwrites the environment of some of its processes, which are known by their folder.
    """
    killed = set()
    for _ in range(200):
        found = [process for process in psutil.process_iter() if _belongs(process, mark, scratch)]
        if not found:
            break
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
                killed.add(process.pid)
        time.sleep(0.02)
    if launcher is not None:
        launcher.wait()
    return len(killed)


def _belongs(process: psutil.Process, mark: str, scratch: Path) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        environment = process.environ()
        if environment:
            return bool(environment.get(MARK) == mark)
        return process.cwd().startswith(f"{scratch}/")
    except (psutil.Error, OSError):
        return False


class News:
    """The events that an attempt itself has recorded; the file is read when it has changed.

    Parameters
    ----------
    folder : Path
        The run folder, before the attempt.
    resumed : bool
        A resumed run's own events follow a ``resume`` event with a higher number than before.
    """

    def __init__(self, folder: Path, resumed: bool) -> None:
        self._path = folder / "metrics.jsonl"
        self._before = max([_number(event) for event in _events(folder)], default=0)
        self._resumed, self._seen = resumed, (0, 0)
        self._events: list[dict[str, Any]] = []

    def events(self) -> list[dict[str, Any]]:
        """Return them."""
        try:
            found = self._path.stat()
        except OSError:
            return []
        if (found.st_ino, found.st_size) != self._seen:
            self._seen = found.st_ino, found.st_size
            self._events = _events(self._path.parent)
            if self._resumed:
                own = [i for i, e in enumerate(self._events) if _number(e) > self._before]
                self._events = self._events[own[0] :] if own else []
        return self._events


def _number(event: dict[str, Any]) -> int:
    return int(event["attempt"]) if event["event"] == "resume" else 0


def _events(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of ``metrics.jsonl`` as events."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]
