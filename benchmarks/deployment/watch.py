"""Observe a deployment while it runs: processes, log lines, and who opens the base model.

`Watch` has lifetime and memory of each process. All processes are sampled several times a second
from outside; nothing is added to the programs. Memory is a process's resident memory as the
operating system counts it, so memory that several processes share (libraries, a file mapped by
both) is counted for each.
"""

import ctypes
import os
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

PROGRAMS = (
    "flower-superlink",
    "flower-supernode",
    "flower-superexec",
    "flwr-serverapp",
    "flwr-clientapp",
    "nginx",
    "pilot-flwr",
    "pilot_flwr.site.worker",
)

CORRECTION = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - psutil.boot_time()
"""To be added to psutil's start of a process, which counts from the boot in whole seconds."""


@dataclass
class Seen:
    """One process: start and last sample (seconds since 1970), peak memory in bytes."""

    machine: str
    program: str
    began: float
    last: float
    peak: int


class Watch:
    """Samples the processes of machines every `pause` seconds while the block runs.

    `machines` has, for each machine, a function that returns the ids of its root processes. `seen`
    holds every process; `peaks` the most bytes that a machine's processes had in one sample.
    """

    def __init__(
        self, machines: Mapping[str, Callable[[], Iterable[int]]], *, pause: float = 0.2
    ) -> None:
        self._machines, self._pause = machines, pause
        self.seen: dict[tuple[int, float], Seen] = {}
        self.peaks: dict[str, int] = dict.fromkeys(machines, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def lives(self, machine: str, program: str) -> list[Seen]:
        """Return the processes of one program on one machine, the oldest first."""
        found = [s for s in self.seen.values() if (s.machine, s.program) == (machine, program)]
        return sorted(found, key=lambda process: process.began)

    def peak_by_program(self, machine: str) -> dict[str, int]:
        """Return the peak bytes of a single process, by program, on a machine."""
        peaks: dict[str, int] = defaultdict(int)
        for process in self.seen.values():
            if process.machine == machine:
                peaks[process.program] = max(peaks[process.program], process.peak)
        return dict(sorted(peaks.items()))

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            children = defaultdict(list)
            for process in psutil.process_iter(["ppid"]):
                children[process.info["ppid"]].append(process)
            for machine, roots in self._machines.items():
                self._sample(machine, _descendants(roots(), children))

    def _sample(self, machine: str, processes: Iterable[psutil.Process]) -> None:
        total, now = 0, time.time()
        for process in processes:
            with suppress(psutil.Error):
                used = process.memory_info().rss
                total += used
                key = (process.pid, process.create_time())
                if key not in self.seen:
                    if not (program := _program(process)):
                        continue  # still the shell that will exec it
                    self.seen[key] = Seen(machine, program, key[1] + CORRECTION, now, used)
                seen = self.seen[key]
                seen.last, seen.peak = now, max(seen.peak, used)
        self.peaks[machine] = max(self.peaks[machine], total)


def _descendants(roots: Iterable[int], children: Mapping[int, list[Any]]) -> list[psutil.Process]:
    found, waiting = [], []
    for pid in roots:
        with suppress(psutil.Error):
            waiting.append(psutil.Process(pid))
    while waiting:
        process = waiting.pop()
        found.append(process)
        waiting += children.get(process.pid, [])
    return found


def _program(process: psutil.Process) -> str:
    """Return which of `PROGRAMS` a process runs, by its command line."""
    names = {word.rsplit("/", 1)[-1] for word in process.cmdline()[:4]}
    return next((name for name in PROGRAMS if name in names), "")


class _Thread:
    """Repeats `step` every 10 ms while the block runs, and once at its end."""

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self.step()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self.step()

    def step(self) -> None:
        """Look once."""
        raise NotImplementedError


class LogTimes(_Thread):
    """When the lines of a log were written, which need not exist yet, in seconds since 1970."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self.lines: list[tuple[float, str]] = []

    def step(self) -> None:
        """Read what is new; half a line waits for its rest."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if size == self._at:
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            new = file.read()
        now, whole = time.time(), new[: new.rfind(b"\n") + 1]
        self._at += len(whole)
        self.lines += [(now, line) for line in whole.decode(errors="replace").splitlines()]


class Opened(_Thread):
    """When any process opened a file, in seconds since 1970, as the kernel reports it (inotify)."""

    _OPEN = 0x20
    _HEADER = struct.Struct("iIII")

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._file = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0 or libc.inotify_add_watch(self._file, bytes(path), self._OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify", str(path))
        self.times: list[float] = []

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        os.close(self._file)

    def step(self) -> None:
        """Read the kernel's events, each without a name."""
        with suppress(BlockingIOError):
            events = os.read(self._file, 1 << 16)
            self.times += [time.time()] * (len(events) // self._HEADER.size)
