"""Hand a message over from Flower's ClientApp to the site's warm service.

Flower starts a process for every message. This one imports neither torch nor transformers, and
repeats the worker's log in its own. If it ends, the service ends the worker's session: warm or not,
a session never outlives its ClientApp.
"""

import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, RecordDict

from pilot_flwr.client.node_config import FLOWER_KEYS, NodeConfig, read_node_config
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.run.provenance import code_hash, versions
from pilot_flwr.site.transport import HungUp, Memory, connect, receive, send, send_message

if TYPE_CHECKING:
    from pilot_flwr.site.handlers import Answer, Kind

PATIENCE_SECONDS = 60.0
"""Limit for the answer to a greeting; a service answers even while its worker computes."""

NOTHING_LOST = "No private state is lost: the client can repeat the exchange."
logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class Service:
    """An open connection to a service that has accepted this code and node config."""

    connection: socket.socket

    def run(self, kind: "Kind", content: RecordDict, context: Context) -> "Answer":
        """Let the worker answer a message, and log its progress; the message's arrays are released.

        Raises `RunError` if the worker dies or the service stops.
        """
        request = {
            "kind": kind,
            "overrides": str(context.run_config["overrides"]),
            "run_id": context.run_id,
            "node_id": context.node_id,
        }
        self.connection.settimeout(None)
        try:
            with Memory() as memory:
                send_message(self.connection, request, content, memory)
            while True:
                packet, reply = receive(self.connection)
                if "log" in packet:
                    logger.log(packet["log"], "%s", packet["text"])
                elif "failed" in packet:
                    raise RunError(packet["failed"])
                elif "error" in packet:
                    return Error(packet["error"], packet["reason"])
                else:
                    return reply
        except HungUp:
            raise RunError(f"The site's service ended during the session. {NOTHING_LOST}") from None


@contextlib.contextmanager
def find_service(node_config: NodeConfig) -> Iterator[Service | None]:
    """Yield a connection to the service of this site's state folder; None if none listens there.

    Raises `ConfigError` if the service has other code, other libraries or another node config, and
    `RunError` if it does not answer.
    """
    folder = read_node_config(node_config).state_folder
    connection = None
    try:
        if folder is not None and folder.is_dir():
            connection = connect(folder)
    except ConnectionRefusedError:
        logger.warning(
            "The service of %s is not running, but has left its socket: this message is answered "
            "without it. Restart `pilot-flwr site serve`.",
            folder,
        )
    if connection is None:
        yield None
        return
    with connection:
        connection.settimeout(PATIENCE_SECONDS)
        try:
            send(connection, greeting(node_config))
            packet, _ = receive(connection)
        except (HungUp, TimeoutError):
            raise RunError(
                f"The site's service does not answer. Restart `pilot-flwr site serve` for {folder}."
            ) from None
        if refusal := packet.get("refused"):
            raise ConfigError(str(refusal))
        yield Service(connection)


def greeting(node_config: NodeConfig) -> dict[str, Any]:
    """Return a ClientApp's first packet: its code hash, library versions and node config."""
    own = {key: value for key, value in node_config.items() if key not in FLOWER_KEYS}
    return {"code": code_hash(), "versions": versions(), "node_config": own}
