"""``pilot-flwr predict``: a model's answers to a file of questions."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilot_flwr.commands.arguments import OVERRIDES, add_model, add_run, chosen, open_chosen, say

if TYPE_CHECKING:
    from pilot_flwr.results.answering import Answerer
    from pilot_flwr.results.questions import Questions


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "predict",
        help="write a model's answers to a file of questions",
        description="Answer the last question of every row of a LLaVA JSON or JSONL file, with or "
        "without an answer in it. The output has a line a row: row, id, question, prediction and, "
        "where the file has them, references. " + OVERRIDES,
        epilog="example: pilot-flwr predict RUN --client vqa-0 --data q.json --images images",
    )
    add_run(parser)
    add_model(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="F", help="questions")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSONL file (default: standard output)"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="do not add the prompt suffix that the task's questions have in the run's data",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=0,
        metavar="N",
        help="longest answer (default: the run's evaluation.max_new_tokens)",
    )
    parser.set_defaults(handler=_predict)


def _predict(options: argparse.Namespace) -> int:
    from pilot_flwr.checks import at_least
    from pilot_flwr.results.answering import Answerer
    from pilot_flwr.results.questions import Questions, open_file
    from pilot_flwr.results.runs import personal_model
    from pilot_flwr.site import find_device

    at_least("--max-new-tokens", options.max_new_tokens, 0)
    run = open_chosen(options)
    who = chosen(run, options)
    answerer = Answerer(run.config, personal_model(run, who, device=find_device(options.device)))
    rows = open_file(run, who.task, answerer, options.data, options.images, plain=options.plain)
    count = _write(Questions(rows), answerer, options)
    if options.out is not None:
        say(f"{count} predictions in {options.out}")
    return 0


def _write(questions: "Questions", answerer: "Answerer", options: argparse.Namespace) -> int:
    """Answer batch by batch; a line is written as soon as its answer is there."""
    size = answerer.config.evaluation.batch_size
    show = options.out is not None and sys.stderr.isatty()
    with _output(options.out) as out:
        for start in range(0, len(questions), size):
            part = questions[start : start + size]
            answers = answerer(part, max_new_tokens=options.max_new_tokens)
            for position, prediction in enumerate(answers, start=start):
                row = {
                    "row": position + 1,
                    "id": questions.examples.row(position)["id"],
                    "question": questions.question(position),
                    "prediction": prediction.strip(),
                }
                if references := questions.references(position):
                    row["references"] = references
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            if show:
                print(f"\r{start + len(part)} of {len(questions)}", end="", file=sys.stderr)
    if show:
        print(file=sys.stderr)
    return len(questions)


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[Any]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("w", encoding="utf-8") as file:
            yield file
