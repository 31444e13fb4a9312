"""One process at a time: a lock on a file, which goes with its holder, however that ends."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pilot_flwr.errors import RunError

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
