"""Whole runs in this process: a Flower grid that calls the ClientApp, and a run over it.

Every message and reply is kept in `InProcessGrid.messages`, so that a test can look at all that
travelled.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Message

from pilot_flwr.client.private_state import PrivateStore
from pilot_flwr.client_app import app
from pilot_flwr.config.loading import load_config, to_yaml
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.flower import grid as in_process
from pilot_flwr.flower.codec import decode_state, encode_state
from pilot_flwr.run.checkpoint import latest_checkpoint
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.provenance import RunIdentity
from pilot_flwr.server.resume import OpenRun
from pilot_flwr.server_app import federate

# Two steps at least: the first layer of an adapter that ends in zero moves at the second.
SMALL = (
    "data.train_examples=4 data.test_examples=2 train.epochs=1 train.batch_size=2 "
    "evaluation.max_new_tokens=2"
)
TWO_TASKS = f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=2 strategy.rounds=1"


def client_by_id(data, client_id):
    """Return the configured client called `client_id`."""
    return {client.id: client for client in federation_clients(data)}[client_id]


class InProcessGrid(in_process.InProcessGrid):
    """The package's grid, which keeps every message and lets a test meddle with replies."""

    def __init__(
        self,
        client_app: Any,
        *,
        num_nodes: int,
        overrides: str,
        node_configs: list[dict[str, Any]] | None = None,
    ) -> None:
        engines = [{"partition-id": i, "num-partitions": num_nodes} for i in range(num_nodes)]
        super().__init__(client_app, node_configs=node_configs or engines, overrides=overrides)
        self.messages: list[Message] = []
        self.on_reply: Callable[[Message, Message], Message | None] = lambda message, reply: reply

    def answer(self, message: Message) -> Message | None:
        self.messages.append(message)
        reply = self.on_reply(message, self._call(message))
        if reply is not None:
            self.messages.append(reply)
        return reply

    def _call(self, message: Message) -> Message:
        return super().answer(message)


class Federation:
    """A run of the demo's app over an in-process grid, and what it left behind."""

    def __init__(self, folder, overrides=TWO_TASKS, **grid_options):
        self.config = load_config(overrides)
        self.grid = InProcessGrid(
            app,
            num_nodes=grid_options.pop("num_nodes", self.config.num_clients),
            overrides=overrides,
            **grid_options,
        )
        self.folder = RunFolder(folder)

    def run(self):
        opened = OpenRun(self.folder, RunIdentity("test-1"))
        self.strategy = federate(self.grid, self.config, opened)
        return self

    def events(self, kind, **match):
        """Return the recorded events of one kind, as the file has them."""
        found = [json.loads(json.dumps(event.to_dict())) for event in self.folder.events]
        return [e for e in found if (e | match | {"event": kind}) == e]

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


def resumed(folder, overrides, *, exchange):
    """Run until the server dies in an exchange, then resume the run; return what did so."""
    first = Federation(folder, overrides)

    def die(message, reply):
        if message.metadata.group_id == str(exchange):
            raise KeyboardInterrupt
        return reply

    first.grid.on_reply = die
    with pytest.raises(KeyboardInterrupt):
        first.run()
    checkpoint, _ = latest_checkpoint(folder / "checkpoint")
    assert checkpoint.server_round == exchange - 1
    second = Federation(folder, overrides)
    opened = OpenRun(second.folder, RunIdentity("test-1"), checkpoint)
    second.strategy = federate(second.grid, second.config, opened)
    return second


def edit(content, part, change):
    """Let `change` alter a copy of the tensors of a message's part."""
    state = {name: tensor.clone() for name, tensor in decode_state(content[part]).items()}
    change(state)
    content[part] = encode_state(state)


def assert_same_state(one, two):
    """Fail unless two servers have the same task adapters and LoRAs, bit for bit."""
    for mine, theirs in ((one.adapters, two.adapters), (one.loras, two.loras)):
        assert mine.keys() == theirs.keys()
        for name, tensors in mine.items():
            assert all(torch.equal(t, theirs[name][key]) for key, t in tensors.items())


def finish(folder, overrides):
    """Run to the end as the ServerApp does, and leave a whole run folder."""
    federation = Federation(folder, overrides)
    federation.folder.write("config.yaml", to_yaml(federation.config))
    federation.run()
    federation.folder.finish(error=None)
    return federation
