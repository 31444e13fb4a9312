"""Growing files, read by what is new in them: lines, and events as JSON lines."""

import json
import os
from pathlib import Path
from typing import Any


class EventTail:
    """Read a growing file of JSON lines.

    Attributes
    ----------
    unreadable : int
        Complete lines so far that were no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.unreadable = 0
        self._lines = LineTail(path)

    def read(self) -> list[dict[str, Any]]:
        """Return the events since the last call; a line still being written waits."""
        events = []
        for line in self._lines.read():
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                events.append(event)
            elif line.strip():
                self.unreadable += 1
        return events


class LineTail:
    """Read a growing text file by complete lines; the file need not exist yet.

    If another file takes its place, that is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._file: int | None = None

    def read(self) -> list[str]:
        """Return the lines completed since the last call, without their ends."""
        try:
            with self._path.open("rb") as stream:
                file = os.fstat(stream.fileno()).st_ino
                self._position = self._position if self._file in (None, file) else 0
                self._file = file
                stream.seek(self._position)
                data = stream.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        return complete.decode("utf-8", errors="replace").splitlines()
