"""Files that are there whole or not at all: named tensors, texts, and their checksums.

Tensors are safetensors. Everything is written to a temporary name, flushed to disk and then
renamed, and the folder is flushed as well, so that a reader finds either the old content or the
new one, whatever dies in between. No pickle is read or written.

One process at a time: a lock on a file, which goes with its holder, however that ends.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pilot_flwr.errors import RunError, StateError
from pilot_flwr.protocol import State

FORMAT = "pilot-flwr-2"
"""Version of the private state's file and of the checkpoint folder."""


def save_tensors(path: Path, tensors: State, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to `path`, atomically.

    Raises
    ------
    OSError
        The folder cannot be written, for instance because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        write_safetensors(temporary, tensors, {"format": FORMAT, **metadata})
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def write_safetensors(
    path: Path, tensors: State, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, neither atomically nor flushed.

    Raises
    ------
    OSError
        With the system's number, which safetensors itself says in its text alone.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """Read what `save_tensors` wrote.

    Raises
    ------
    StateError
        The file is torn, or not of this format.
    """
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata alone.

    Raises
    ------
    StateError
        The file is torn, or not of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:  # refuses a file that is cut short
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path} has format {metadata.get('format')!r} but must have {FORMAT!r}.")
    return metadata


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises
    ------
    OSError
        The folder cannot be written, for instance because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in `folder`: no reader looks at it."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def sha256(path: Path) -> str:
    """Return a file's SHA-256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


_TAKEN = (errno.EAGAIN, errno.EACCES)
_TICK_SECONDS = 0.2


@contextlib.contextmanager
def hold(path: Path, what: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file while the block runs.

    Parameters
    ----------
    path : Path
        Made if it does not exist; it stays.
    what : str
        What the lock is for, as the subject of an error.
    patience : float
        Seconds to wait for a holder that is about to end.

    Raises
    ------
    RunError
        Another process holds it.
    OSError
        The file system has no locks, or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                if time.monotonic() >= deadline:
                    raise RunError(f"{what} is in use by another process.") from None
            time.sleep(_TICK_SECONDS)
        yield
    finally:
        os.close(descriptor)
