"""``pilot-flwr evaluate``: score the models of a run."""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pilot_flwr.cli.common import OVERRIDES, add_run, chosen, new_file, open_chosen, say
from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:
    from pilot_flwr.data.federation import Client
    from pilot_flwr.inference.evaluate import Scored
    from pilot_flwr.inference.runs import Run, Selected


Chosen = list[tuple["Client", "Selected"]]


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "evaluate",
        help="score the models of a run",
        description="Score the personalised models of a run, each on its own client's data, or "
        "with --task a task's consensus model on the data of the task's clients. " + OVERRIDES,
        epilog="example: pilot-flwr evaluate outputs/demo-20260101-120000 --client vqa-0",
    )
    add_run(parser)
    parser.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="C",
        help="only this client; may be given again",
    )
    parser.add_argument("--task", metavar="T", help="the consensus model of task T")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="folder of the one client's private state (default: clients/C in the run folder)",
    )
    parser.add_argument("--split", choices=("test", "train"), default="test", help="default: test")
    parser.add_argument(
        "--data", type=Path, metavar="F", help="score on this LLaVA JSON or JSONL file instead"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of that file's images")
    parser.add_argument(
        "--metric", metavar="M", help="metric (default: the one of the client's task)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the scores to a new FILE as well"
    )
    parser.set_defaults(handler=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from pilot_flwr.client.node import find_device
    from pilot_flwr.inference.evaluate import (
        EvaluationSet,
        evaluate_models,
        mean_over_tasks,
        task_scores,
    )

    _check(options)
    with contextlib.ExitStack() as stack:
        out = None
        if options.json is not None:
            out = stack.enter_context(new_file("--json", options.json))
        run = open_chosen(options)
        rows = evaluate_models(
            run,
            _choose(run, options),
            EvaluationSet(options.split, options.data, options.images, options.metric or ""),
            device=find_device(options.device),
            say=say,
            progress=_progress,
        )
        _print(rows, run)
        if out is not None:
            result = {
                "run": str(run.folder),
                "round": run.checkpoint.server_round,
                "split": "data" if options.data else options.split,
                "clients": [asdict(row) for row in rows],
                "tasks": task_scores(rows),
                "mean_over_tasks": mean_over_tasks(rows),
            }
            out.write(json.dumps(result, indent=2) + "\n")
    return 0


def _check(options: argparse.Namespace) -> None:
    from pilot_flwr.config.rules import one_of
    from pilot_flwr.metrics.registry import METRICS

    if options.metric is not None:
        one_of("--metric", options.metric, tuple(METRICS))
    if options.state is not None and len(options.client) != 1:
        raise ConfigError("`--state` is one client's folder: give exactly one `--client`.")
    if options.state is not None and options.task is not None:
        raise ConfigError("`--state` belongs to a client: a consensus model (`--task`) has none.")
    if options.images is not None and options.data is None:
        raise ConfigError("`--images` belongs to `--data`.")


def _choose(run: "Run", options: argparse.Namespace) -> Chosen:
    """Return every client to score, and whose model is scored on its data."""
    from pilot_flwr.inference.runs import select_consensus

    wanted = [run.client(name) for name in options.client] or run.clients()
    if options.task is None:
        pairs = []
        for client in wanted:
            one = argparse.Namespace(task=None, client=client.id, state=options.state)
            pairs.append((client, chosen(run, one)))
        return pairs
    model = select_consensus(run, options.task)
    mine = [client for client in wanted if client.task == options.task]
    if not mine:
        raise ConfigError(f"None of the clients of `--client` has task {options.task!r}.")
    return [(client, model) for client in mine]


def _progress(client: str, total: int, done: int) -> None:
    if sys.stderr.isatty():
        end = "" if done < total else "\n"
        print(f"\r{client}: {done} of {total}", end=end, file=sys.stderr)


def _print(rows: "list[Scored]", run: "Run") -> None:
    from rich.console import Console
    from rich.table import Table

    from pilot_flwr.inference.evaluate import mean_over_tasks, task_scores
    from pilot_flwr.metrics.registry import METRICS

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
    for task, score in task_scores(rows).items():
        count = sum(row.examples for row in rows if row.task == task)
        table.add_row("all", task, "", "", "", str(count), f"{score:.3f}", "")
    table.add_row("mean over tasks", "", "", "", "", "", f"{mean_over_tasks(rows):.3f}", "")
    print(f"{run.folder}, exchange {run.checkpoint.server_round}", flush=True)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if len({METRICS[row.metric].maximum for row in rows}) > 1:
        say("The tasks' metrics have different ranges: their mean is no figure to compare.")
    for reason in dict.fromkeys(row.approximate for row in rows if row.approximate):
        say(f"Approximate: {reason}")
