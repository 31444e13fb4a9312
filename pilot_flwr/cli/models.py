"""``pilot-flwr evaluate``, ``predict``, ``chat`` and ``export``: use the models of a run."""

import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from pilot_flwr.cli.common import (
    SUCCESS,
    Changes,
    ClientName,
    Device,
    Exchange,
    Images,
    Plain,
    RunFolder,
    StateFolder,
    TaskName,
    load_model,
    new_file,
    open_model,
    open_run,
    print_table,
    say,
    select_client,
)
from pilot_flwr.errors import ConfigError, DataError

if TYPE_CHECKING:  # heavy imports stay inside commands
    from pilot_flwr.data.federation import Client
    from pilot_flwr.inference.evaluate import Scored
    from pilot_flwr.inference.generate import Answerer, Conversation, Questions
    from pilot_flwr.inference.runs import Run, Selected

CHAT_HELP = """Type a question; the model sees the whole conversation.
/image FILE   attach an image to your next question
/reset        start a new conversation
/quit         quit (or press Ctrl-D)"""


def evaluate(
    run_folder: RunFolder,
    changes: Changes = None,
    server_round: Exchange = None,
    device: Device = "auto",
    client: Annotated[
        list[str] | None,
        typer.Option(metavar="C", help="Only this client; repeatable."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="T", help="The consensus model of task T.")
    ] = None,
    state: StateFolder = None,
    split: Annotated[Literal["test", "train"], typer.Option()] = "test",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="F",
            help="Score on this file of rows (JSON, JSONL, parquet) instead of the client's data.",
        ),
    ] = None,
    images: Images = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="M", help="Metric (default: the one of the client's task)."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the scores to a new file."),
    ] = None,
    answers_file: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            metavar="FILE",
            help="Also write every answer with its score to a new JSONL file.",
        ),
    ] = None,
) -> int:
    """Score the models of a run.

    Score each personalised model on its client's data or, with --task, a task's consensus model on
    the data of that task's clients.

    Example: `pilot-flwr evaluate outputs/demo-20260101-120000 --client vqa-0`
    """
    from pilot_flwr.client.node import find_device
    from pilot_flwr.config.rules import one_of
    from pilot_flwr.inference.evaluate import EvaluationSet, evaluate_models, mean_scores
    from pilot_flwr.metrics import METRICS

    if metric is not None:
        one_of("--metric", metric, tuple(METRICS))
    if state is not None and (task is not None or len(client or ()) != 1):
        raise ConfigError("`--state` is the folder of one client: give exactly one `--client`.")
    if images is not None and data is None:
        raise ConfigError("`--images` needs `--data`.")
    with contextlib.ExitStack() as stack:
        out, lines = (
            stack.enter_context(new_file(option, path)) if path else None
            for option, path in (("--json", json_file), ("--answers", answers_file))
        )
        run = open_run(run_folder, server_round, changes)
        rows = evaluate_models(
            run,
            _select_models(run, client or [], task, state),
            EvaluationSet(split, data, images, metric or ""),
            device=find_device(device),
            say=say,
            progress=_progress,
        )
        _print_scores(rows, run)
        if out is not None:
            by_task, mean = mean_scores(rows)
            result = {
                "run": str(run.folder),
                "round": run.checkpoint.server_round,
                "split": "data" if data else split,
                "clients": [
                    {k: v for k, v in asdict(row).items() if k != "answers"} for row in rows
                ],
                "tasks": by_task,
                "mean_over_tasks": mean,
            }
            out.write(json.dumps(result, indent=2) + "\n")
        if lines is not None:
            for row in rows:
                for answer in row.answers:
                    line = {"client": row.client, **answer._asdict()}
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    return SUCCESS


def _select_models(
    run: "Run", names: list[str], task: str | None, state: Path | None
) -> "list[tuple[Client, Selected]]":
    """Return pairs of a client and the model to score on its data."""
    from pilot_flwr.inference.runs import select_consensus

    clients = [run.client(name) for name in names] or run.clients()
    if task is None:
        return [(client, select_client(run, client.id, state)) for client in clients]
    model = select_consensus(run, task)
    pairs = [(client, model) for client in clients if client.task == task]
    if not pairs:
        raise ConfigError(f"None of the clients of `--client` has task {task!r}.")
    return pairs


def _progress(title: str, total: int, done: int) -> None:
    if sys.stderr.isatty():
        end = "" if done < total else "\n"
        print(f"\r{title}: {done} of {total}", end=end, file=sys.stderr)


def _print_scores(rows: "list[Scored]", run: "Run") -> None:
    from rich.table import Table

    from pilot_flwr.inference.evaluate import mean_scores
    from pilot_flwr.metrics import METRICS

    table = Table("client", "task", "model", "stage", "metric", "examples", "score", "in the run")
    for row in rows:
        table.add_row(
            row.client,
            row.task,
            row.model,
            str(row.stage),
            METRICS[row.metric].title + (" (approximate)" if row.approximate else ""),
            str(row.examples),
            f"{row.score:.3f}",
            "–" if row.recorded is None else f"{row.recorded:.3f}",
        )
    table.add_section()
    by_task, mean = mean_scores(rows)
    for task, score in by_task.items():
        count = sum(row.examples for row in rows if row.task == task)
        table.add_row("all", task, "", "", "", str(count), f"{score:.3f}", "")
    table.add_row("mean over tasks", "", "", "", "", "", f"{mean:.3f}", "")
    print(f"{run.folder}, exchange {run.checkpoint.server_round}", flush=True)
    print_table(table)
    if len({METRICS[row.metric].maximum for row in rows}) > 1:
        say("The tasks' metrics have different ranges: do not compare their mean.")
    for reason in dict.fromkeys(row.approximate for row in rows if row.approximate):
        say(f"Approximate: {reason}")


def predict(
    run_folder: RunFolder,
    data: Annotated[Path, typer.Option(metavar="F", help="File of questions.", show_default=False)],
    changes: Changes = None,
    server_round: Exchange = None,
    device: Device = "auto",
    client: ClientName = None,
    task: TaskName = None,
    state: StateFolder = None,
    images: Images = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="New JSONL file (default: standard output)."),
    ] = None,
    plain: Plain = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Maximum length of an answer in tokens.",
            show_default="the run's evaluation.max_new_tokens",
        ),
    ] = 0,
) -> int:
    """Write a model's answers to a file of questions.

    Answer the last question in every row of a file (JSON, JSONL, parquet); rows need no answers.
    The output has a line per row: row, id, question, prediction and, if the file has them,
    references.

    Example: `pilot-flwr predict RUN --client vqa-0 --data q.json --images images`
    """
    from pilot_flwr.client.node import find_device
    from pilot_flwr.config.rules import at_least
    from pilot_flwr.inference.generate import Questions, check_all, open_answerer, open_file

    at_least("--max-new-tokens", max_new_tokens, 0)
    with new_file("--out", out) if out else contextlib.nullcontext(sys.stdout) as file:
        run, selected = open_model(run_folder, server_round, changes, client, task, state)
        answerer = open_answerer(run, selected, device=find_device(device), say=say)
        questions = Questions(open_file(run, selected.task, answerer, data, images, plain=plain))
        check_all(questions, answerer)
        _write_answers(questions, answerer, file, max_new_tokens)
    if out is not None:
        say(f"{len(questions)} predictions in {out}")
    return SUCCESS


def _write_answers(
    questions: "Questions", answerer: "Answerer", out: TextIO, max_new_tokens: int
) -> None:
    """Answer in batches, and write each batch immediately."""
    size = answerer.config.evaluation.batch_size
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        answers = answerer(batch, max_new_tokens=max_new_tokens)
        for position, prediction in enumerate(answers, start=start):
            row = {
                "row": questions.row_number(position),
                "id": questions.id(position),
                "question": questions.question(position),
                "prediction": prediction.strip(),
            }
            if references := questions.references(position):
                row["references"] = references
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        out.flush()
        if out is not sys.stdout:
            _progress("questions", len(questions), start + len(batch))


def chat(
    run_folder: RunFolder,
    changes: Changes = None,
    server_round: Exchange = None,
    device: Device = "auto",
    client: ClientName = None,
    task: TaskName = None,
    state: StateFolder = None,
    image: Annotated[Path | None, typer.Option(metavar="F", help="Start with this image.")] = None,
    question: Annotated[
        str | None, typer.Option(metavar="Q", help="Answer this question and exit.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Maximum length of an answer in tokens.")
    ] = 512,
    plain: Plain = False,
) -> int:
    """Talk to a personalised model, or to a task's consensus model.

    Reads questions from the terminal or a pipe, one per line. Commands in a conversation:
    /image FILE, /reset, /quit.
    """
    from pilot_flwr.client.node import find_device
    from pilot_flwr.config.rules import at_least
    from pilot_flwr.inference.generate import Conversation, open_answerer

    at_least("--max-new-tokens", max_new_tokens, 1)
    run, selected = open_model(run_folder, server_round, changes, client, task, state)
    answerer = open_answerer(run, selected, device=find_device(device), keep=True, say=say)
    conversation = Conversation(
        answerer,
        max_new_tokens=max_new_tokens,
        suffix="" if plain else run.prompt_suffix(selected.task),
        pad=run.config.data.image_aspect_ratio == "pad",
        official=run.config.data.image_reading == "official",
    )
    if image is not None:
        conversation.show(image)
    if question is not None:
        _answer(conversation, question)
        return SUCCESS
    say(f"{selected.name}, stage {answerer.model.stage}, task {selected.task}")
    if conversation.suffix:
        say(f"Appended to every question: {conversation.suffix!r} (omit with --plain)")
    _talk(conversation)
    return SUCCESS


def _answer(conversation: "Conversation", question: str) -> None:
    """Print an answer, streaming it on a terminal."""
    if sys.stdout.isatty():
        conversation.ask(question, lambda text: print(text, end="", flush=True))
        print()
    else:
        print(conversation.ask(question), flush=True)


def _talk(conversation: "Conversation") -> None:
    """Answer lines until the input ends or a line is /quit."""
    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):  # decode invalid bytes to surrogates,
        sys.stdin.reconfigure(errors="surrogateescape")  # which the conversation rejects
    if terminal:
        say(CHAT_HELP)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/reset":
                conversation.reset()
                say("Started a new conversation.")
            elif command == "/image":
                conversation.show(Path(rest.strip()))
                say("Attached to your next question.")
            elif command.startswith("/"):
                say(CHAT_HELP)
            elif command:
                _answer(conversation, line)
        except DataError as error:
            say(str(error))


def export(
    run_folder: RunFolder,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="New or empty output folder.", show_default=False)
    ],
    changes: Changes = None,
    server_round: Exchange = None,
    device: Device = "auto",
    client: ClientName = None,
    task: TaskName = None,
    state: StateFolder = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Merge LoRA and adapters into one Hugging Face checkpoint (stage 1 and consensus "
            "models only).",
        ),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Precision of the merged checkpoint (default: the run's model.dtype)."),
    ] = None,
) -> int:
    """Export a model to a folder that loads without this package.

    The folder needs only torch, transformers and peft: LoRA in peft's format, the connector as
    safetensors, the loading code, and a model card.

    Example: `pilot-flwr export outputs/demo-20260101-120000 my-model --client vqa-0`
    """
    if dtype is not None and not merge:
        raise ConfigError(
            "`--dtype` needs `--merge`: other exports leave the base model unchanged."
        )
    run, selected = open_model(run_folder, server_round, changes, client, task, state)
    if merge:
        card = _export_merged(run, selected, folder, device, dtype or run.config.model.dtype)
    else:
        card = _export_adapters(run, selected, folder, device)
    (folder / "README.md").write_text(card, encoding="utf-8")
    _warn_of_private_parts(selected)
    print(folder, flush=True)
    return SUCCESS


def _export_adapters(run: "Run", selected: "Selected", folder: Path, device: str) -> str:
    """Write LoRA and connector; return the model card."""
    from pilot_flwr.inference.export import (
        check_exportable,
        export_model,
        model_card,
        new_folder,
    )
    from pilot_flwr.inference.generate import Answerer

    check_exportable(run, selected)
    new_folder(folder)  # fails before the model is loaded
    model = load_model(run, selected, device)
    export_model(
        model,
        folder,
        client_adapter=selected.private is not None,
        end_token_ids=Answerer(run.config, model).end_token_ids(),
        data=run.config.data,
    )
    return model_card(run, selected, stage=model.stage)


def _export_merged(run: "Run", selected: "Selected", folder: Path, device: str, dtype: str) -> str:
    """Write a merged checkpoint; return the model card."""
    from pilot_flwr.client.node import find_device
    from pilot_flwr.inference.export import check_exportable, model_card, new_folder
    from pilot_flwr.inference.generate import Answerer
    from pilot_flwr.inference.merge import check_mergeable, merge_model
    from pilot_flwr.inference.runs import load_adapters
    from pilot_flwr.model.loading import load_base
    from pilot_flwr.model.pilot_model import PilotModel

    check_exportable(run, selected)
    check_mergeable(selected.private)
    new_folder(folder)
    config = replace(run.config.model, quantization="none", dtype=dtype)
    model = PilotModel(load_base(config, find_device(device)), config)  # merging consumes the model
    load_adapters(model, run, selected)
    end_token_ids = Answerer(run.config, model).end_token_ids()
    hidden = merge_model(model, folder, end_token_ids=end_token_ids)
    if hidden:
        say(
            f"The projector needs a hidden layer of {hidden}, which the class of transformers "
            "does not support: load the model with the exported class in modeling_wide.py."
        )
    return model_card(run, selected, stage=1, merged="wide" if hidden else "plain", dtype=dtype)


def _warn_of_private_parts(selected: "Selected") -> None:
    from pilot_flwr.algorithm.parameter_groups import GROUPS

    private = selected.private
    if private is None or private.empty:
        return
    parts = [GROUPS[group].symbol for group, named in private.groups.items() if named]
    parts += [f"{GROUPS[group].symbol} of its personal model" for group in private.personal]
    say(
        f"This folder holds adapters that never left client {selected.name} during the run "
        f"({', '.join(parts)}). Share it only with the client's consent."
    )
