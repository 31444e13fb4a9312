"""Atomic writes of tensors and texts, checksums, and an exclusive file lock.

Tensors are safetensors; no pickle is read or written. A file is written under a temporary name,
flushed to disk and renamed, and its folder is flushed as well: after a crash at any point, a
reader finds either the old content or the new.

The lock is released when its holder exits, even by SIGKILL. On a file system without `flock`,
`filelock` would fall back to a lock that outlives its holder; here that is an error.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from pilot_flwr.algorithm.mapped import read_around
from pilot_flwr.errors import RunError, StateError
from pilot_flwr.protocol import State
from pilot_flwr.run import tensor_buffer

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "pilot-flwr-2"
"""Format of private states and checkpoints."""


CHECKSUM = "checksum"
"""Key of a file's metadata: the SHA-256 of the file with zeros in place of its digits."""

_ZEROS = "0" * 64
_SPOOL = ".spooled."


def save_tensors(
    path: Path, tensors: State, metadata: Mapping[str, str], *, checksum: bool = False
) -> None:
    """Write tensors and metadata to `path`, atomically; with `checksum`, add `CHECKSUM`."""
    sealed = {CHECKSUM: _ZEROS} if checksum else {}
    with _replacing(path) as temporary:
        digest = hashlib.sha256() if checksum else None
        write_safetensors(temporary, tensors, {"format": FORMAT, **metadata, **sealed}, digest)
        if digest is not None:
            with temporary.open("r+b") as file:
                _, place = _sealed_header(file, _ZEROS)
                file.seek(place)
                file.write(digest.hexdigest().encode())


def check_checksum(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise `StateError` unless a file is what `save_tensors` wrote with `checksum`."""
    written = metadata.get(CHECKSUM, "")
    if not written or _digest(path, written) != written:
        raise StateError(f"{path} has been changed: its SHA-256 is another one.")


def _digest(path: Path, written: str) -> str:
    """Return the checksum of a file whose header has the checksum `written`."""
    with path.open("rb") as file:
        header, _ = _sealed_header(file, written)
        digest = hashlib.sha256(header)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sealed_header(file: BinaryIO, written: str) -> tuple[bytes, int]:
    """Read a header; return it with zeros for the checksum `written`, and their offset."""
    size = file.read(8)
    header = size + file.read(int.from_bytes(size, "little"))
    field = f'"{CHECKSUM}":"'.encode()
    place = header.find(field + written.encode() + b'"') + len(field)
    return header[:place] + _ZEROS.encode() + header[place + len(_ZEROS) :], place


def write_safetensors(
    path: Path,
    tensors: State,
    metadata: Mapping[str, str] | None = None,
    digest: "hashlib._Hash | None" = None,
) -> None:
    """Write a safetensors file, neither atomically nor flushed; update `digest` with its bytes.

    Contiguous tensors are written without a copy; the library's `save_file` would copy all of them
    first.
    """
    header, _ = tensor_buffer.layout(tensors, metadata)
    try:
        with path.open("wb") as file:
            for part in (header, *tensor_buffer.contents(tensors)):
                file.write(part)
                if digest is not None:
                    digest.update(part)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def load_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """Read a file of `save_tensors`; `StateError` if it is truncated or of another format."""
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


class TensorFile(dict[str, "Tensor"]):
    """The tensors of a file, mapped into memory: the kernel pages them in and out.

    Such a file is never changed once it is complete, so it may be linked into other folders.
    `sha256` is empty until it has been computed.
    """

    def __init__(self, path: Path, tensors: State, sha256: str = "") -> None:
        super().__init__(tensors)
        self.path, self.sha256 = path, sha256


def create_tensors(path: Path, layout: State, metadata: Mapping[str, str]) -> TensorFile:
    """Create a file of zeros with the names, shapes and dtypes of `layout`; map it for writing.

    Call `complete` when it is filled. Raises `OSError` if the disk has no room for it.
    """
    import torch

    header, size = tensor_buffer.layout(layout, {"format": FORMAT, **metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        # Reserved now: writing a mapped page to a full disk kills the process.
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
    # Unlike `numpy.memmap`, it keeps no file descriptor: there may be a thousand of these files.
    mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    read_around(mapped[len(header) :], enabled=False)
    tensors = tensor_buffer.views(mapped.numpy())
    return TensorFile(path, tensors)


def complete(created: TensorFile) -> None:
    """Mark a file of `create_tensors` as written; page faults read around from now on."""
    for tensor in created.values():
        read_around(tensor, enabled=True)


def spool_tensors(tensors: State, folder: Path) -> State:
    """Write tensors to an unlinked file in `folder` and map it; its space is freed with them."""
    if not tensors:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_SPOOL}{os.getpid()}.tmp"
    try:
        mapped = create_tensors(path, tensors, {})
        for name, tensor in tensors.items():
            mapped[name].copy_(tensor)
        complete(mapped)
    finally:
        path.unlink(missing_ok=True)
    return mapped


def read_metadata(path: Path) -> dict[str, str]:
    """Read only the metadata; `StateError` if the file is truncated or of another format."""
    try:
        with safe_open(path, framework="np") as file:  # rejects a truncated file
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path} has format {metadata.get('format')!r} but must have {FORMAT!r}.")
    return metadata


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block is done, flush it and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers from `folder`."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # a folder is not removed
            path.unlink()


def sha256(path: Path) -> str:
    """Return a file's SHA-256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_TICK_SECONDS = 0.2


@contextlib.contextmanager
def hold(path: Path, what: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on a file, created if missing, while the block runs.

    After `patience` seconds of waiting for another holder, a `RunError` names `what` is in use. A
    file system without locks raises an `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(PermissionError):  # a user who can open it can block it
            os.fchmod(descriptor, 0o600)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() >= deadline:
                    raise RunError(f"{what} is in use by another process.") from None
            time.sleep(_TICK_SECONDS)
        yield
    finally:
        os.close(descriptor)
