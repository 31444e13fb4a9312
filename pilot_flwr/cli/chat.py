"""``pilot-flwr chat``: talk to a model of a run in the terminal."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pilot_flwr.cli.common import OVERRIDES, add_model, add_run, chosen, open_chosen, say

if TYPE_CHECKING:
    from pilot_flwr.inference.generate import Conversation


HELP = """Type a question; the model sees the whole conversation.
/image FILE   show it an image, with your next question
/reset        forget the conversation and its images
/quit         end (as does Ctrl-D)"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "chat",
        help="talk to a personalised model, or to a task's consensus model",
        description="Talk to a model of a run, about an image or without one. Questions are read "
        "from the terminal or from a pipe, one a line. " + OVERRIDES,
        epilog="in a conversation: /image FILE, /reset, /quit",
    )
    add_run(parser)
    add_model(parser)
    parser.add_argument("--image", type=Path, metavar="F", help="begin with this image")
    parser.add_argument("--question", metavar="Q", help="answer this one question, and end")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="do not add the prompt suffix that the task's questions have in the run's data",
    )
    parser.set_defaults(handler=_chat)


def _chat(options: argparse.Namespace) -> int:
    from pilot_flwr.client.node import find_device
    from pilot_flwr.config.rules import at_least
    from pilot_flwr.inference.generate import Answerer, Conversation
    from pilot_flwr.inference.runs import load_model

    at_least("--max-new-tokens", options.max_new_tokens, 1)
    run = open_chosen(options)
    who = chosen(run, options)
    model = load_model(run, who, device=find_device(options.device))
    conversation = Conversation(
        Answerer(run.config, model, keep=f"chat {id(options)}"),
        max_new_tokens=options.max_new_tokens,
        suffix="" if options.plain else run.prompt_suffix(who.task),
        pad=run.config.data.image_aspect_ratio == "pad",
    )
    if options.image is not None:
        conversation.show(options.image)
    if options.question is not None:
        _answer(conversation, options.question)
        return 0
    say(f"{who.name}, stage {model.stage}, task {who.task}")
    if conversation.suffix:
        say(f"After every question comes: {conversation.suffix!r} (--plain leaves it out)")
    return _talk(conversation)


def _answer(conversation: "Conversation", question: str) -> None:
    """Print an answer, on a terminal word by word."""
    if sys.stdout.isatty():
        conversation.ask(question, lambda text: print(text, end="", flush=True))
        print()
    else:
        print(conversation.ask(question), flush=True)


def _talk(conversation: "Conversation") -> int:
    from pilot_flwr.errors import DataError

    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text come as halves of characters,
        sys.stdin.reconfigure(errors="surrogateescape")  # which the conversation refuses
    if terminal:
        say(HELP)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return 0
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                return 0
            elif command == "/reset":
                conversation.reset()
                say("The conversation is forgotten.")
            elif command == "/image":
                conversation.show(Path(rest.strip()))
                say("Shown with your next question.")
            elif command.startswith("/"):
                say(HELP)
            elif command:
                _answer(conversation, line)
        except DataError as error:
            say(str(error))
