"""Record all traffic between two machines: a TCP proxy that keeps each byte."""

import socket
import threading
from contextlib import suppress


class Recorder:
    """Listens on a port of 127.0.0.1 and forwards everything to another one.

    Parameters
    ----------
    target : int
        The port to which it connects.

    Attributes
    ----------
    port : int
        The port on which it listens.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._streams: list[tuple[str, bytearray]] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._server.close()

    def bytes(self, way: str) -> bytes:
        """Return all bytes that went ``up`` or ``down``, connection after connection."""
        with self._lock:
            return b"\0\0\0\0".join(bytes(data) for name, data in self._streams if name == way)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        """Forward both ways until both are closed, then close the sockets."""
        with near, socket.socket() as far:
            try:
                far.connect(("127.0.0.1", self._target))
            except OSError:  # nothing is there any more
                return
            ways = []
            for way, source, sink in (("up", near, far), ("down", far, near)):
                data = bytearray()
                with self._lock:
                    self._streams.append((way, data))
                arguments = (source, sink, data)
                ways.append(threading.Thread(target=self._forward, args=arguments, daemon=True))
                ways[-1].start()
            for thread in ways:
                thread.join()

    def _forward(self, source: socket.socket, sink: socket.socket, data: bytearray) -> None:
        """Record what arrives, and forward it as long as the receiver accepts it."""
        taken = True
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                with self._lock:
                    data += piece
                if taken:
                    try:
                        sink.sendall(piece)
                    except OSError:
                        taken = False
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class Windows:
    """Short pieces of a secret, to search for in a recording.

    A piece has 64 bytes, far less than an HTTP frame, and enough different values that it does not
    occur by chance: stretches of zeros or of one colour are skipped.
    """

    SIZE = 64
    MOST = 12
    LEAST_VALUES = 14

    def __init__(self, secret: bytes) -> None:
        starts = range(0, len(secret) - self.SIZE + 1, self.SIZE)
        pieces = [secret[i : i + self.SIZE] for i in starts]
        pieces = [piece for piece in pieces if len(set(piece)) >= self.LEAST_VALUES]
        self.pieces = pieces[:: max(1, len(pieces) // self.MOST)][: self.MOST]

    def __bool__(self) -> bool:
        return bool(self.pieces)

    def found_in(self, recording: bytes) -> int:
        """Return how many of the pieces are in a recording."""
        return sum(piece in recording for piece in self.pieces)
