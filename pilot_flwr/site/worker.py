"""The process of a warm service that computes: it keeps the base model, features and processor.

``python -P -m pilot_flwr.site.worker DESCRIPTOR`` receives, over the socket of that descriptor, the
connection of one ClientApp at a time, answers its message and says so. It ends with its service.
"""

import logging
import os
import select
import socket
import sys
import threading

from flwr.app import Context, Error, RecordDict

from pilot_flwr.run.provenance import code_hash
from pilot_flwr.site.handlers import Answer, answer, failure
from pilot_flwr.site.transport import LONGEST_TEXT, HungUp, receive, send

logger = logging.getLogger("flwr")


class _Forward(logging.Handler):
    """Sends the log to the ClientApp, and its last line to the service, as its status."""

    def __init__(self, control: socket.socket, connection: socket.socket) -> None:
        super().__init__(logging.INFO)
        self._control, self._connection = control, connection

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`; a ClientApp that has ended reads nothing."""
        text = self.format(record)[:LONGEST_TEXT]
        try:
            send(self._control, {"busy": text})
            send(self._connection, {"log": record.levelno, "text": text})
        except (HungUp, OSError):
            pass


def main(descriptor: int) -> None:
    """Answer messages until the service ends."""
    control = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    from pilot_flwr.client import session  # noqa: F401
    from pilot_flwr.model import loading, pilot_model  # noqa: F401  # torch and transformers

    send(control, {"code": code_hash()})
    while True:
        _, connections, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not connections:  # the service has ended
            return
        with socket.socket(fileno=connections[0]) as connection:
            _answer_one(control, connection)


def _answer_one(control: socket.socket, connection: socket.socket) -> None:
    from pilot_flwr.model.loading import is_loaded

    forward = _Forward(control, connection)
    logger.addHandler(forward)
    connection.settimeout(None)  # the service's time limit holds for the descriptor, too
    try:
        request, content = receive(connection)
        context = Context(
            run_id=request["run_id"],
            node_id=request["node_id"],
            node_config=request["node_config"],
            state=RecordDict(),
            run_config={"overrides": request["overrides"]},
        )
        reply = answer(request["kind"], content, context)
        send(control, {"done": True, "warm": is_loaded()})
        try:
            _send_reply(connection, reply)
        except OSError as error:  # no memory for it
            _send_reply(connection, failure(error, content, context))
    except HungUp:
        logger.warning("The ClientApp ended before it received the reply.")
    finally:
        logger.removeHandler(forward)


def _send_reply(connection: socket.socket, reply: Answer) -> None:
    if isinstance(reply, Error):
        send(connection, {"error": reply.code, "reason": reply.reason})
    else:
        send(connection, {}, reply)


def _end_with(control: socket.socket) -> None:
    """End this process when the service has ended, whatever the main thread does."""
    poller = select.poll()
    poller.register(control, select.POLLRDHUP)
    poller.poll()
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
