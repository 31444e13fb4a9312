"""Packets over the Unix socket between a ClientApp and its site's warm service.

A packet is a JSON object. The records of a message travel in an anonymous file in memory
(`memfd_create`), whose descriptor is sent over the socket: arrays are written once and mapped by
the receiver, the file has no name that another process could open, and nothing is left when a
process dies. The kernel delivers a packet whole or not at all (`SOCK_SEQPACKET`).

The socket is in the site's state folder and accessible to its owner only; each side also obtains
its peer's user id from the kernel, and refuses any other user.
"""

import contextlib
import fcntl
import json
import mmap
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from pilot_flwr.errors import RunError

SOCKET = "worker.sock"
"""Name of the service's socket in a ``state-folder``."""

LONGEST_PACKET = 1 << 16
LONGEST_TEXT = 10_000
"""Limit for a line of the log in characters, which take at most six bytes each in a packet."""

_DESCRIPTORS = "/proc/self/fd"
_ONE_USER = "run the SuperNode and `pilot-flwr site serve` as one user."
_KINDS = {"config": ConfigRecord, "metrics": MetricRecord}


class HungUp(Exception):
    """The other side has closed the connection or died."""


def listen(folder: Path) -> socket.socket:
    """Listen on the socket in `folder`; replace one that a dead service has left."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _short(folder) as path:
        Path(path).unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
    listener.listen()
    return listener


def connect(folder: Path) -> socket.socket | None:
    """Connect to the service that listens in `folder`; None if there is none.

    Raises `ConnectionRefusedError` if a dead service has left its socket, and `RunError` if the
    socket belongs to another user.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(folder) as path:
            connection.connect(path)
        check_peer(connection)
    except FileNotFoundError:
        connection.close()
        return None
    except PermissionError:
        connection.close()
        raise RunError(f"The site's socket belongs to another user: {_ONE_USER}") from None
    except BaseException:
        connection.close()
        raise
    return connection


def check_peer(connection: socket.socket) -> None:
    """Raise `RunError` unless the process at the other end has this process's user."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise RunError(
            f"The process at the other end of the site's socket runs as user {user} but must run "
            f"as user {os.geteuid()}: {_ONE_USER}"
        )


class Memory:
    """An anonymous file in memory for one message, closed at the end of the block.

    Arrays in buffers from `allocate` are sent without another copy.
    """

    def __init__(self) -> None:
        self.file = os.memfd_create("pilot-flwr", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._end = 0
        self._places: dict[int, int] = {}
        self._buffers: list[mmap.mmap] = []  # kept alive, so that their ids stay unique

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.file)
        self._places.clear()
        self._buffers.clear()

    def allocate(self, size: int) -> mmap.mmap:
        """Return a writable buffer in the file, of at least one byte."""
        size = max(size, 1)
        place = self._end + -self._end % mmap.ALLOCATIONGRANULARITY
        os.posix_fallocate(self.file, place, size)  # otherwise full memory kills the process later
        buffer = mmap.mmap(self.file, size, offset=place)
        self._end = place + size
        self._places[id(buffer)] = place
        self._buffers.append(buffer)
        return buffer

    def place_of(self, data: Any) -> int:
        """Return the offset of an array's bytes in the file; write them if they are elsewhere."""
        if id(data) not in self._places:
            self.allocate(len(data))[: len(data)] = data
            return self._places[id(self._buffers[-1])]
        return self._places[id(data)]

    def seal(self) -> None:
        """Fix the file's size: reading beyond the end of a shrunk file would kill the receiver."""
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def send(connection: socket.socket, packet: Mapping[str, Any], *, wait: bool = True) -> None:
    """Send a packet without records; raise `HungUp` if the other side has hung up.

    Without `wait`, raise `BlockingIOError` if the other side reads too slowly.
    """
    with _hang_up_noticed():
        data = json.dumps(packet, ensure_ascii=False).encode("utf-8", "replace")
        connection.send(data, 0 if wait else socket.MSG_DONTWAIT)


def send_message(
    connection: socket.socket, packet: Mapping[str, Any], content: RecordDict, memory: Memory
) -> None:
    """Send a packet of any length and the records of a message, whose arrays are removed from it.

    Raises `HungUp` if the other side has hung up, and `OSError` if there is too little memory.
    """
    index = json.dumps(_index(packet, content, memory)).encode()
    place = memory.place_of(index)
    memory.seal()
    with _hang_up_noticed():
        packed = json.dumps([place, len(index)]).encode()
        socket.send_fds(connection, [packed], [memory.file])


def receive(connection: socket.socket) -> tuple[dict[str, Any], RecordDict]:
    """Receive a packet and the records of its message, if it has any.

    Arrays are views of the sender's memory. Raises `HungUp` if the other side has hung up,
    `RunError` for a malformed packet, and `TimeoutError` as the socket does.
    """
    try:
        data, files, flags, _ = socket.recv_fds(
            connection, LONGEST_PACKET, 1, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        raise HungUp from None
    try:
        if not data:
            raise HungUp
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("it is too long")
        packet = json.loads(data)
        content = RecordDict()
        if files:
            packet, content = _read(files[0], *packet)
        if not isinstance(packet, dict):
            raise ValueError("it is not a JSON object")
        return packet, content
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"A packet on the site's socket cannot be read: {error}.") from error
    finally:
        for file in files:
            os.close(file)


@contextlib.contextmanager
def _hang_up_noticed() -> Iterator[None]:
    try:
        yield
    except (BrokenPipeError, ConnectionResetError):
        raise HungUp from None


def _index(packet: Mapping[str, Any], content: RecordDict, memory: Memory) -> dict[str, Any]:
    """Move a message's arrays into `memory`; return everything else, with their offsets."""
    index: dict[str, Any] = {"packet": packet, "arrays": {}}
    for kind, of in _KINDS.items():
        index[kind] = {name: dict(r) for name, r in content.items() if isinstance(r, of)}
    for name in list(content.array_records):
        index["arrays"][name] = entries = {}
        for key, array in content.array_records[name].items():
            place = memory.place_of(array.data)
            entries[key] = [array.dtype, array.shape, array.stype, place, len(array.data)]
            del array
        del content[name]
    return index


def _read(file: int, place: int, length: int) -> tuple[dict[str, Any], RecordDict]:
    if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("its memory is not sealed")
    # Writable private pages, never written to: torch warns about read-only memory.
    memory = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_COPY))
    index = json.loads(bytes(_part(memory, place, length)))
    content = RecordDict()
    for kind, of in _KINDS.items():
        for name, values in index[kind].items():
            content[name] = of(values)
    for name, arrays in index["arrays"].items():
        record = ArrayRecord()
        for key, (dtype, shape, stype, start, size) in arrays.items():
            array = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=b"")
            array.data = _part(memory, start, size)  # type: ignore[assignment]
            record[key] = array
        content[name] = record
    return index["packet"], content


def _part(memory: memoryview, start: int, size: int) -> memoryview:
    if not 0 <= start <= start + size <= len(memory):
        raise ValueError("its parts lie outside its memory")
    return memory[start : start + size]


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """Yield a short path of the socket: the system allows 107 bytes."""
    if not os.path.isdir(_DESCRIPTORS):
        yield str(folder / SOCKET)
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"{_DESCRIPTORS}/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
