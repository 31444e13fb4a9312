"""The events of a run that died: those that count go on, the rest is moved aside, never lost."""

import json
from pathlib import Path

from pilot_flwr.errors import StateError
from pilot_flwr.storage.run_folder import Event
from pilot_flwr.storage.tensors import write_bytes


def read_lines(path: Path) -> list[bytes]:
    """Return the lines of a file with their ends, the last perhaps cut short; none if absent."""
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []


def parse(lines: list[bytes], path: Path) -> list[Event]:
    """Return lines of ``metrics.jsonl`` as events.

    Parameters
    ----------
    lines : list of bytes
        Whole lines, from the first on.
    path : Path
        Where they are from, for the error.

    Raises
    ------
    StateError
        One is no event.
    """
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            event["event"], event["elapsed"]
        except (ValueError, KeyError, TypeError):
            raise StateError(f"{path}, line {number}, is no event of a run.") from None
        events.append(event)
    return events


def earlier_attempts(path: Path, lines: list[bytes]) -> list[int]:
    """Return the numbers of the resumptions of a run folder, by its files and its events."""
    numbers = (p.stem.removeprefix("interrupted-") for p in path.glob("interrupted-*.jsonl"))
    found = [int(number) for number in numbers if number.isdecimal()]
    for line in lines:
        if b'"resume"' in line:
            try:
                found.append(int(json.loads(line).get("attempt", 0)))
            except (ValueError, TypeError, AttributeError):
                continue  # cut short
    return found


def set_aside(path: Path, lines: list[bytes], kept: list[bytes], attempt: int) -> str:
    """Move the events behind the kept ones to a file of their own.

    Parameters
    ----------
    path : Path
        The run folder.
    lines, kept : list of bytes
        All lines of ``metrics.jsonl``, and the first ones of them, which stay.
    attempt : int
        The number of this resumption.

    Returns
    -------
    str
        Name of the file; empty if there is nothing to move.
    """
    rest = b"".join(lines[len(kept) :])
    if not rest:
        return ""
    target = path / f"interrupted-{attempt}.jsonl"
    before = path / f"interrupted-{attempt - 1}.jsonl"
    if before.is_file() and before.read_bytes() == rest:  # died before the next line, last time
        target = before
    else:
        write_bytes(target, rest)
    write_bytes(path / "metrics.jsonl", b"".join(kept))
    return target.name
