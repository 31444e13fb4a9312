"""``pilot-flwr predict``: a model's answers to a file of questions."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pilot_flwr.cli.common import OVERRIDES, add_model, add_run, chosen, new_file, open_chosen, say

if TYPE_CHECKING:
    from pilot_flwr.inference.generate import Answerer, Questions


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
        "--out", type=Path, metavar="FILE", help="new JSONL file (default: standard output)"
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
    from pilot_flwr.config.rules import at_least

    at_least("--max-new-tokens", options.max_new_tokens, 0)
    if options.out is None:
        _answer(options, sys.stdout)
    else:
        with new_file("--out", options.out) as out:
            count = _answer(options, out)
        say(f"{count} predictions in {options.out}")
    return 0


def _answer(options: argparse.Namespace, out: TextIO) -> int:
    """Answer all rows, after a look at each of them; return how many."""
    from pilot_flwr.client.node import find_device
    from pilot_flwr.inference.generate import Answerer, Questions, check_all, open_file
    from pilot_flwr.inference.runs import load_model

    run = open_chosen(options)
    who = chosen(run, options)
    answerer = Answerer(run.config, load_model(run, who, device=find_device(options.device)))
    rows = open_file(run, who.task, answerer, options.data, options.images, plain=options.plain)
    questions = Questions(rows)
    check_all(questions, answerer)
    _write(questions, answerer, options, out)
    return len(questions)


def _write(
    questions: "Questions", answerer: "Answerer", options: argparse.Namespace, out: TextIO
) -> None:
    """Answer batch by batch; a line is written as soon as its answer is there."""
    size = answerer.config.evaluation.batch_size
    show = options.out is not None and sys.stderr.isatty()
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
