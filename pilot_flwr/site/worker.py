"""The worker of a warm site: answer messages, keeping base model, features and processor.

``python -P -m pilot_flwr.site.worker DESCRIPTOR`` receives one ClientApp's connection at a time
over the socket of that descriptor, answers the message and reports completion to the service. It
ends when its service does.
"""

import contextlib
import json
import logging
import os
import select
import socket
import sys
import threading
from typing import Any

from flwr.app import Context, Error, RecordDict

from pilot_flwr.errors import RunError
from pilot_flwr.run.provenance import code_hash
from pilot_flwr.site.handlers import Answer, answer, failure
from pilot_flwr.site.transport import (
    LONGEST_PACKET,
    LONGEST_TEXT,
    HungUp,
    Memory,
    receive,
    send,
    send_message,
)

PATIENCE_SECONDS = 60.0
"""Limit for a ClientApp to send its message, and to read the reply."""

logger = logging.getLogger("flwr")


class _Forward(logging.Handler):
    """Forwards each line of the log to the ClientApp, and to the service as its status."""

    def __init__(self, control: socket.socket, connection: socket.socket) -> None:
        super().__init__(logging.INFO)
        self._control, self._connection = control, connection

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`; a line that cannot be sent is dropped."""
        text = self.format(record)[:LONGEST_TEXT]
        with contextlib.suppress(HungUp, BlockingIOError):  # nobody reads it
            send(self._control, {"busy": text}, wait=False)
            send(self._connection, {"log": record.levelno, "text": text}, wait=False)


def main(descriptor: int) -> None:
    """Answer messages until the service ends."""
    control = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    from pilot_flwr.client import session  # noqa: F401  # imports torch before the first message
    from pilot_flwr.client.parallel import end_ranks
    from pilot_flwr.model.feature_cache import forget_features
    from pilot_flwr.model.loading import is_loaded

    send(control, {"code": code_hash()})
    run = None
    while True:
        packet, connections, _, _ = socket.recv_fds(
            control, LONGEST_PACKET, 1, socket.MSG_CMSG_CLOEXEC
        )
        if not connections:  # the service has ended
            return
        with socket.socket(fileno=connections[0]) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            try:
                request, content = receive(connection)
                if run != (run := request["run_id"]):
                    forget_features()  # features are kept within a run
                    end_ranks()  # these keep features, too
                request["node_config"] = json.loads(packet)  # the service's, not the ClientApp's
                _answer(control, connection, request, content)
            except (HungUp, TimeoutError) as error:
                logger.warning("The ClientApp did not receive a reply: %r", error)
            except RunError as error:  # a malformed message
                send(connection, {"failed": str(error)})
        send(control, {"done": True, "warm": is_loaded()})


def _answer(
    control: socket.socket,
    connection: socket.socket,
    request: dict[str, Any],
    content: RecordDict,
) -> None:
    context = Context(
        run_id=request["run_id"],
        node_id=request["node_id"],
        node_config=request["node_config"],
        state=RecordDict(),
        run_config={"overrides": request["overrides"]},
    )
    forward = _Forward(control, connection)
    logger.addHandler(forward)
    try:
        with Memory() as memory:
            reply = answer(request["kind"], content, context, allocate=memory.allocate)
            send(control, {"replying": True})
            try:
                _send_reply(connection, reply, memory)
            except (MemoryError, OSError) as error:  # too little memory
                if isinstance(error, TimeoutError):
                    raise
                _send_reply(connection, failure(error, content, context), memory)
    finally:
        logger.removeHandler(forward)


def _send_reply(connection: socket.socket, reply: Answer, memory: Memory) -> None:
    if isinstance(reply, Error):
        send(connection, {"error": reply.code, "reason": reply.reason})
    else:
        send_message(connection, {}, reply, memory)


def _end_with(control: socket.socket) -> None:
    """End this process when the service ends, even while the main thread computes."""
    poller = select.poll()
    poller.register(control, select.POLLRDHUP)
    poller.poll()
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
