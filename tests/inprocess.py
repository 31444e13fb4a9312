"""Whole runs in this process: a Flower grid that calls the ClientApp, and a run over it.

Messages and replies pass through Flower's own serialisation of arrays; every one of them is
kept in `InProcessGrid.messages`, so that a test can look at all that travelled.
"""

import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import InMemoryGrid

from pilot_flwr.client_app import app
from pilot_flwr.config import load_config, to_yaml
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.server_app import federate
from pilot_flwr.storage.checkpoint import RunIdentity
from pilot_flwr.storage.private_state import PrivateStore
from pilot_flwr.storage.resume import Opened
from pilot_flwr.storage.run_folder import RunFolder

# Two steps at least: the first layer of an adapter that ends in zero moves at the second.
SMALL = (
    "data.train_examples=8 data.test_examples=2 train.epochs=1 train.batch_size=2 "
    "evaluation.max_new_tokens=2"
)
TWO_TASKS = f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=2 strategy.rounds=1"


def client_by_id(data, client_id):
    """Return the configured client called `client_id`."""
    return {client.id: client for client in federation_clients(data)}[client_id]


class InProcessGrid(Grid):
    """Nodes 1 … n with partition ids 0 … n − 1; each message is answered at once."""

    def __init__(
        self,
        client_app: Any,
        *,
        num_nodes: int,
        overrides: str,
        node_configs: list[dict[str, Any]] | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
        self.client_app = client_app
        self.nodes = list(range(1, num_nodes + 1))
        self.overrides = overrides
        self.node_configs = node_configs or [
            {"partition-id": i, "num-partitions": num_nodes} for i in range(num_nodes)
        ]
        self.messages: list[Message] = []
        self.on_reply: Callable[[Message, Message], Message | None] = lambda message, reply: reply
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            identity = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = identity
            ids.append(identity)
            self.messages.append(message)
            reply = self.on_reply(message, self._call(message))
            if reply is not None:
                self.messages.append(reply)
                self._replies[identity] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def _call(self, message: Message) -> Message:
        index = message.metadata.dst_node_id - 1
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=self.node_configs[index],
            state=RecordDict(),
            run_config={"overrides": self.overrides},
        )
        try:
            return self.client_app(message=message, context=context)
        except Exception as error:  # as Flower does: an exception becomes an error reply
            return Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError


class SimulatedGrid(InProcessGrid, InMemoryGrid):
    """The same, as a run under Flower's simulation engine has it."""


class Federation:
    """A run of the demo's app over an in-process grid, and what it left behind."""

    def __init__(self, folder, overrides=TWO_TASKS, **grid_options):
        self.config = load_config(overrides)
        nodes = grid_options.get("node_configs") or []
        real = any("client-id" in node for node in nodes)
        self.grid = (InProcessGrid if real else SimulatedGrid)(
            app,
            num_nodes=grid_options.pop("num_nodes", self.config.num_clients),
            overrides=overrides,
            **grid_options,
        )
        self.folder = RunFolder(folder)

    def run(self):
        opened = Opened(self.folder, RunIdentity("test-1"))
        self.strategy = federate(self.grid, self.config, opened)
        return self

    def events(self, kind, **match):
        return [e for e in self.folder.select(kind) if all(e[k] == v for k, v in match.items())]

    def replies(self, message_type):
        """Successful replies of one type, in order."""
        return [
            m
            for m in self.grid.messages
            if m.metadata.reply_to_message_id
            and m.metadata.message_type == message_type
            and not m.has_error()
        ]

    def private(self, client):
        return PrivateStore(
            self.folder.path / "clients" / client, client, client.rsplit("-", 1)[0]
        ).load()


def finish(folder, overrides):
    """Run to the end as the ServerApp does, and leave a whole run folder."""
    federation = Federation(folder, overrides)
    federation.folder.write("config.yaml", to_yaml(federation.config))
    federation.run()
    federation.folder.finish(error=None)
    return federation
