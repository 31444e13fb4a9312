"""The ClientApp: hand train and evaluate messages to the site's warm service, or answer here."""

from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pilot_flwr.site.door import find_service

if TYPE_CHECKING:
    from pilot_flwr.site.handlers import Kind

app = ClientApp()


def _reply(kind: "Kind", message: Message, context: Context) -> Message:
    content = message.content
    try:
        with find_service(context.node_config) as service:
            if service is not None and kind != "query":
                return Message(service.run(kind, content, context), reply_to=message)
    except Exception as error:
        from pilot_flwr.site.handlers import failure

        return Message(failure(error, content, context), reply_to=message)
    from pilot_flwr.site.handlers import answer  # not needed if a service answers

    return Message(answer(kind, content, context), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Report which client this node is, its version, and whether it holds stage-1 state."""
    return _reply("query", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate the incoming personalised model, then train it."""
    return _reply("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the incoming personalised model."""
    return _reply("evaluate", message, context)
