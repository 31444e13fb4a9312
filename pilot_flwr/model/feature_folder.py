"""A folder of cached visual features, shared by runs and bounded in size.

An entry's name is the SHA-256 of everything that its features depend on, so entries never become
stale, and any number of processes may use one folder. Writing and pruning happen under a lock. If
the folder is full, the least recently used entries are removed, except those used since this run
began: training visits all images in every epoch, for which keeping the first entries is the best
fixed policy.

A file holds the size of all entries, so that opening a folder does not list them. It is absent
while entries are written: if a writer is killed, the next user of the folder measures the size
again. It is too large after a damaged entry was removed, until the folder is full and is measured.

Entries can be recreated, so they are not flushed to disk as states are. An entry with a wrong
checksum counts as absent. If the folder cannot be written, this is reported once and nothing more
is stored.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pilot_flwr.errors import RunError
from pilot_flwr.formatting import human_bytes
from pilot_flwr.run.atomic import hold, remove_leftovers

RESERVE = 2**30
"""Bytes of disk space kept free for private states and results."""

_LOCK, _SIZE = ".lock", ".bytes"
_PATIENCE_SECONDS = 60.0


class FeatureFolder:
    """Cached features in `folder`, at most `limit` bytes.

    Entries used at `since` (nanoseconds, as `st_mtime_ns`) or later are never removed. `progress`
    gets a line if features cannot be stored.
    """

    def __init__(
        self, folder: Path, *, limit: int, since: int, progress: Callable[[str], None]
    ) -> None:
        self.folder, self.limit, self.since, self.progress = folder, limit, since, progress
        self._stores = True
        self._locked(self._open)

    def get(self, name: str) -> Tensor | None:
        """Return the features of an entry, None if it is absent or damaged."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                written = (file.metadata() or {}).get("sha256")
                features: Tensor = file.get_tensor("features")
            if written == _checksum(features):
                os.utime(path)
                return features
        except OSError:
            return None
        except SafetensorError:
            pass
        with contextlib.suppress(OSError):  # so that `put` writes it again
            path.unlink()
        return None

    def put(self, entries: Mapping[str, Tensor]) -> None:
        """Store features on the CPU by name, as far as there is room."""
        if self._stores:
            self._locked(lambda: self._put(entries))

    def _open(self) -> None:
        if self._read_size() > self.limit:
            self._write_size(self._prune(0))

    def _put(self, entries: Mapping[str, Tensor]) -> None:
        used = self._read_size()
        (self.folder / _SIZE).unlink(missing_ok=True)
        for name, features in entries.items():
            used = self._add(self._path(name), features, used)
        self._write_size(used)

    def _add(self, path: Path, features: Tensor, used: int) -> int:
        """Write an entry if there is room; return the size of all entries."""
        if path.exists() or not self._stores:
            return used
        features = features.contiguous()
        content = save({"features": features}, {"sha256": _checksum(features)})
        if used + len(content) > self.limit:
            used = self._prune(len(content))
        if used + len(content) > self.limit:
            self._stop(f"the entries of this run alone take {human_bytes(used)}")
        elif shutil.disk_usage(self.folder).free < len(content) + RESERVE:
            self._stop(f"its disk has less than {human_bytes(RESERVE)} free")
        else:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            used += len(content)
        return used

    def _prune(self, needed: int) -> int:
        """Remove old entries until `needed` bytes fit; return the size of the others."""
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # a damaged one, removed by `get`
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        used = sum(size for _, size, _ in entries)
        if used + needed <= self.limit:
            return used
        target = self.limit - needed - self.limit // 20  # 5 % more, to prune less often
        for modified, size, path in sorted(entries):
            if used <= target or modified >= self.since:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _locked(self, action: Callable[[], None]) -> None:
        """Run `action` under the folder's lock; after a disk error, stop storing."""
        try:
            with hold(self.folder / _LOCK, "the folder", patience=_PATIENCE_SECONDS):
                action()
        except OSError as error:
            self._stop(error.strerror or type(error).__name__)
        except RunError as error:
            self._stop(str(error))

    def _stop(self, reason: str) -> None:
        if self._stores:
            self.progress(
                f"no more features are cached in {self.folder}: {reason}. Images that are not "
                "in it are encoded each time they are used"
            )
        self._stores = False

    def _read_size(self) -> int:
        """Return the size of all entries; if it is unknown, clean up and measure it."""
        try:
            return int((self.folder / _SIZE).read_text())
        except (OSError, ValueError):
            remove_leftovers(self.folder)
            used = self._prune(0)
            self._write_size(used)
            return used

    def _write_size(self, used: int) -> None:
        (self.folder / _SIZE).write_text(str(used))

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


def _checksum(features: Tensor) -> str:
    content = features.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()
