"""The yardstick of ``payload.py``: plain HTTPS between two processes, and a write to disk.

Nothing but Python's own HTTP server, httpx and the certificates of the federation: what the same
bytes cost if they are only downloaded, uploaded and written.
"""

import multiprocessing
import os
import ssl
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import httpx

_BLOCK = 2**20
_REPETITIONS = 5


class _Handler(BaseHTTPRequestHandler):
    """``GET /<bytes>`` sends as many bytes, ``PUT`` receives some; both hold all in memory."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        size = int(self.path.removeprefix("/"))
        self._head(size)
        for start in range(0, size, _BLOCK):
            self.wfile.write(self.server.content[: min(_BLOCK, size - start)])

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        received = memoryview(bytearray(size))
        while received:
            count = self.rfile.readinto(received[:_BLOCK])
            assert count, "the client hung up"
            received = received[count:]
        self._head(0)

    def _head(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Print nothing."""


def _serve(certificate: Path, key: Path, ready: Connection) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    server.content = memoryview(os.urandom(_BLOCK))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    ready.send(server.server_port)
    server.serve_forever()


def plain_seconds(tls: Path, folder: Path, *, down: int, up: int) -> dict[str, float]:
    """Return the median seconds of a download, an upload and a flushed write of the upload's bytes.

    Parameters
    ----------
    tls : Path
        Folder with ``ca.crt``, ``server.crt`` (of localhost) and ``server.key``.
    folder : Path
        Gets the file that is written, and removed.
    down, up : int
        Bytes.
    """
    spawn = multiprocessing.get_context("spawn")
    parent, child = spawn.Pipe()
    server = spawn.Process(
        target=_serve, args=(tls / "server.crt", tls / "server.key", child), daemon=True
    )
    server.start()
    try:
        if not parent.poll(60):
            raise SystemExit("The server of the plain transfers does not start.")
        context = ssl.create_default_context(cafile=tls / "ca.crt")
        url, content = f"https://localhost:{parent.recv()}", os.urandom(up)
        with httpx.Client(verify=context, timeout=600, trust_env=False) as client:
            return {
                "download": _timed(lambda: _download(client, url, down)),
                "upload": _timed(lambda: client.put(url, content=content).raise_for_status()),
                "write": _timed(lambda: _write(folder / "written", content)),
            }
    finally:
        server.terminate()
        server.join()


def _download(client: httpx.Client, url: str, size: int) -> None:
    received = client.get(f"{url}/{size}").raise_for_status().content
    assert len(received) == size


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _timed(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return round(median(seconds), 3)
