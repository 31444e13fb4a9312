"""``pilot-flwr data check``: everything about a federation's data, before there is a run."""

import argparse
import functools
import json
import os
import re
import shlex
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilot_flwr.errors import ConfigError, DataError

if TYPE_CHECKING:  # heavy imports stay inside handlers
    from pilot_flwr.config.schema import PilotConfig
    from pilot_flwr.data.client_files import SiteFiles, Split
    from pilot_flwr.data.federation import Client
    from pilot_flwr.data.images import Colour
    from pilot_flwr.data.llava import LlavaExamples
    from pilot_flwr.data.validation import SplitStatistics, Tokenize

    Sites = list[tuple[Client, SiteFiles | None]]
    Splits = list[tuple[SplitStatistics, LlavaExamples | None]]


SUCCESS, FAILURE = 0, 1
_WORD = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    check = commands.add_parser(
        "check",
        help="look at every row and image of a federation, before there is a run",
        description="Look at every row of every client as training would: structure, images, "
        "length in tokens; and report counts, broken rows and figures about the answers. "
        "Exit code: 0 nothing was found that stops a run, 1 it would stop, 2 wrong usage or "
        "configuration.",
        epilog="example: pilot-flwr data check data=my-federation.yaml model=llava-1.5-7b",
    )
    check.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra override")
    check.add_argument("--fast", action="store_true", help="read image headers, decode nothing")
    check.add_argument(
        "--no-tokens", action="store_true", help="do not tokenize; needs no model's processor"
    )
    check.add_argument(
        "--node-config",
        metavar="WORDS",
        help="check a real site's own data: its node config, words or a .toml file as for "
        "`flower-supernode`",
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    check.add_argument(
        "--show", type=int, default=10, metavar="N", help="broken rows to list (default: 10)"
    )
    check.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads for images"
    )
    check.set_defaults(handler=_check)


def _check(options: argparse.Namespace) -> int:
    from pilot_flwr.config.federation_file import with_folder
    from pilot_flwr.config.loading import load_config
    from pilot_flwr.config.rules import at_least
    from pilot_flwr.data.validation import shared_rows

    at_least("--show", options.show, 0)
    at_least("--workers", options.workers, 1)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"`--json` is {str(options.json)!r}, whose folder is not there.")
    config, _ = with_folder(load_config(shlex.join(options.overrides)), options.overrides)
    if config.data.source != "llava":
        raise ConfigError("`data.source` must be llava: only files can be checked.")
    config, sites = _sites(config, options.node_config)
    splits = _open(config, sites, _background(config, options))
    _check_output(options.json, splits)
    shared = list(shared_rows([(f"{r.client} {r.split}", e) for r, e in splits if e is not None]))
    wrong = [(a, b, n) for a, b, n in shared if not a.endswith(" test") or not b.endswith(" test")]
    _look(splits, config, options)
    reports = [report for report, _ in splits]
    unseen = ["pixels (`--fast`)"] * options.fast + ["tokens (`--no-tokens`)"] * options.no_tokens
    _print(reports, wrong, options.show, unseen)
    if options.json is not None:
        found = {
            "splits": [
                report.summary() | {"broken_rows": [asdict(p) for p in report.problems]}
                for report in reports
            ],
            "shared_rows": [{"splits": [a, b], "rows": n} for a, b, n in wrong],
        }
        try:
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"`--json` cannot be written: {error.strerror}.") from None
    return FAILURE if any(report.stops for report in reports) else SUCCESS


def _check_output(output: Path | None, splits: "Splits") -> None:
    """Refuse to write the figures over the rows themselves."""
    files = {file.path.resolve() for _, e in splits if e is not None for file in e.files}
    if output is not None and output.resolve() in files:
        raise ConfigError(f"`--json` is {str(output)!r} but must not be one of the data's files.")


def _open(config: "PilotConfig", sites: "Sites", background: "Colour | None") -> "Splits":
    """Open every split; one that cannot be read has the reason in its report."""
    from pilot_flwr.data.federation import client_examples
    from pilot_flwr.data.llava import LlavaExamples
    from pilot_flwr.data.validation import SplitStatistics

    data = config.data
    decodes = data.check_images == "decode"
    splits: Splits = []
    for client, files in sites:
        for split in ("train", "test"):
            if split == "test" and not config.evaluation.enabled:
                continue
            report = SplitStatistics(
                client.id, client.task, split, allowed=data.allowed_broken, decodes=decodes
            )
            examples = None
            try:
                read = client_examples(
                    data, client, split, seed=config.seed, files=files, background=background
                )
                assert isinstance(read, LlavaExamples)
                examples = read
            except (ConfigError, DataError) as error:
                report.error = str(error)
            splits.append((report, examples))
    return splits


def _sites(config: "PilotConfig", node_config: str | None) -> "tuple[PilotConfig, Sites]":
    """Return the clients with their files, and the configuration as it holds at them.

    Without a node config, as it is written for ``flower-supernode``, they are simulated.
    """
    from pilot_flwr.client.node import read_node_config, site_client, site_config, site_files
    from pilot_flwr.client.preflight import check_files
    from pilot_flwr.data.federation import federation_clients

    if node_config is None:
        return config, [(client, None) for client in federation_clients(config.data)]
    node = read_node_config(_values(node_config))
    client = site_client(node, config)
    files = site_files(node, client)
    check_files(files, evaluated=config.evaluation.enabled)
    return site_config(node, config, simulated=False), [(client, files)]


def _values(node_config: str) -> dict[str, Any]:
    """Read a node config as ``flower-supernode`` does: words, or the name of a TOML file."""
    if node_config.endswith(".toml"):
        try:
            return tomllib.loads(Path(node_config).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"`--node-config` names {node_config!r}: {error}.") from None
    values: dict[str, Any] = {}
    rest = node_config.strip()
    while rest:
        word = _WORD.match(rest)
        try:
            if word is None:
                raise ValueError
            values |= tomllib.loads(f"{word[1]} = {word[2]}")
        except ValueError:
            raise ConfigError(
                f"`--node-config` has {rest!r} but must be KEY=VALUE words with every text in "
                "quotes, or the name of a .toml file."
            ) from None
        rest = rest[word.end() :].strip()
    return values


def _background(config: "PilotConfig", options: argparse.Namespace) -> "Colour | None":
    from pilot_flwr.data.federation import padding_colour
    from pilot_flwr.model.base import load_processor

    if options.no_tokens:  # any colour will do, and none needs a processor
        return (0, 0, 0) if config.data.image_aspect_ratio == "pad" else None
    processor = load_processor(config.model.path, config.model.revision)
    return padding_colour(config.data, processor.image_processor)


def _look(splits: "Splits", config: "PilotConfig", options: argparse.Namespace) -> None:
    """Look at the rows; those that several clients share, as a test file's, only once."""
    from rich.console import Console
    from rich.progress import Progress

    from pilot_flwr.data.federation import check_references, task_metric
    from pilot_flwr.data.validation import WholeImages, check_split

    images = None if options.fast else WholeImages(options.workers)
    tokenize = {} if options.no_tokens else _tokenizers(config)
    seen: dict[object, SplitStatistics] = {}
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("rows", total=sum(len(e) for _, e in splits if e is not None))
        for index, (report, examples) in enumerate(splits):
            if examples is None:
                continue
            files = tuple(str(file.path) for file in examples.files)
            metric = task_metric(config.data, report.task)
            key = (report.split, metric, files, examples.reading, examples.rows.tobytes())
            if key in seen:
                splits[index] = (replace(seen[key], client=report.client), examples)
            else:
                bars.update(bar, description=f"{report.client} {report.split}")
                seen[key] = check_split(
                    examples,
                    report,
                    tokenize=tokenize.get(report.split),
                    images=images,
                    workers=options.workers,
                    references=functools.partial(check_references, metric)
                    if report.split == "test"
                    else None,
                )
            bars.advance(bar, len(examples))


def _tokenizers(config: "PilotConfig") -> "dict[Split, Tokenize]":
    """Return what a run does with the rows of each split."""
    from pilot_flwr.model.base import known_config, load_processor, make_collator

    model = config.model
    collator = make_collator(
        model,
        load_processor(model.path, model.revision),
        known_config(model),
        max_length=config.train.max_length,
    )
    return {"train": collator.tokenize, "test": lambda example: (collator.prompt(example), [])}


def _print(
    reports: "list[SplitStatistics]",
    shared: list[tuple[str, str, int]],
    show: int,
    unseen: list[str],
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    titles = ("client", "split", "rows", "broken", "images", "turns", "tokens: median, max")
    table = Table(*titles, "labelled: mean", "most frequent answer")
    for report in reports:
        row = report.summary()
        share = row["most_frequent_answer_share"]
        answer = f"{share:.0%} {row['most_frequent_answer']!r}" if share is not None else ""
        tokens = (
            "" if row["tokens_max"] is None else f"{row['tokens_median']:g}, {row['tokens_max']}"
        )
        cells = (report.client, report.split, report.rows, report.rows - report.usable)
        figures = (report.images, row["turns_mean"], tokens, row["labelled_tokens_mean"], answer)
        table.add_row(*(Text("" if c is None else str(c)) for c in (*cells, *figures)))
    console = Console(width=None if os.isatty(1) else 150)
    console.print(table)
    for first, second, rows in shared:
        print(f"{first} and {second} have {rows} rows in common.")
    problems = [
        f"{report.client} {report.split}: {line}"
        for report in reports
        for line in ([report.error] if report.error else [])
        + [p.message + (f" ({p.image})" if p.image else "") for p in report.problems]
    ]
    for line in problems[:show]:
        print(line)
    if len(problems) > show:
        print(f"... and {len(problems) - show} more; `--show` and `--json` have them.")
    stopping = [f"{report.client} {report.split}" for report in reports if report.stops]
    if stopping:
        print(f"A run would stop at {', '.join(stopping)}.")
    elif unseen:
        print(f"Nothing that stops a run was found, but not looked at: {', '.join(unseen)}.")
    else:
        print("A run can start.")
