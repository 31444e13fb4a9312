"""``pilot-flwr data check``: everything about a federation's data, before there is a run."""

import argparse
import json
import os
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pilot_flwr.errors import ConfigError, DataError

if TYPE_CHECKING:  # heavy imports stay inside handlers
    from pilot_flwr.data.check import SplitReport, Tokenize
    from pilot_flwr.data.federation import Client, SiteFiles, Split
    from pilot_flwr.data.image_files import Colour
    from pilot_flwr.data.llava import LlavaExamples
    from pilot_flwr.settings import PilotConfig

    Splits = list[tuple[SplitReport, LlavaExamples | None]]

SUCCESS, FAILURE = 0, 1


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    check = commands.add_parser(
        "check",
        help="look at every row and image of a federation, before there is a run",
        description="Look at every row of every client as training would: structure, images, "
        "length in tokens; and report counts, broken rows and figures about the answers. "
        "Exit code: 0 a run can start, 1 it would stop, 2 wrong usage or configuration.",
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
        help="check a real site's own data: its node config, as for `flower-supernode`",
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
    from pilot_flwr.checks import at_least
    from pilot_flwr.config import load_config
    from pilot_flwr.data.check import shared_rows
    from pilot_flwr.federation_file import with_folder

    at_least("--show", options.show, 0)
    at_least("--workers", options.workers, 1)
    config, _ = with_folder(load_config(shlex.join(options.overrides)), options.overrides)
    if config.data.source != "llava":
        raise ConfigError("`data.source` must be llava: only files can be checked.")
    splits = _open(config, options, None if options.no_tokens else _background(config))
    shared = list(shared_rows([(f"{r.client} {r.split}", e) for r, e in splits if e is not None]))
    wrong = [(a, b, n) for a, b, n in shared if not a.endswith(" test") or not b.endswith(" test")]
    _look(splits, config, options)
    reports = [report for report, _ in splits]
    _print(reports, wrong, options.show)
    if options.json is not None:
        found = {
            "splits": [
                report.summary() | {"broken_rows": [asdict(p) for p in report.problems]}
                for report in reports
            ],
            "shared_rows": [{"splits": [a, b], "rows": n} for a, b, n in wrong],
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return FAILURE if any(report.stops for report in reports) else SUCCESS


def _open(
    config: "PilotConfig", options: argparse.Namespace, background: "Colour | None"
) -> "Splits":
    """Open every split; one that cannot be read has the reason in its report."""
    from pilot_flwr.data.check import SplitReport
    from pilot_flwr.data.federation import client_examples, federation_clients
    from pilot_flwr.data.llava import LlavaExamples

    data = config.data
    sites: list[tuple[Client, SiteFiles | None]]
    if options.node_config is not None:
        sites = [_site(config, options.node_config)]
    else:
        sites = [(client, None) for client in federation_clients(data)]
    if background is None:  # sizes do not depend on it
        data = replace(data, image_aspect_ratio="keep")
    splits: Splits = []
    for client, files in sites:
        for split in ("train", "test"):
            if split == "test" and not config.evaluation.enabled:
                continue
            report = SplitReport(client.id, client.task, split, allowed=data.allowed_broken)
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


def _site(config: "PilotConfig", words: str) -> "tuple[Client, SiteFiles]":
    """Return client and files of a node config as it is written for ``flower-supernode``."""
    from pilot_flwr.data.federation import client_by_id
    from pilot_flwr.site import site_files

    node_config: dict[str, bool | float | int | str] = {}
    for word in shlex.split(words):
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"`--node-config` has {word!r} but must be KEY=VALUE words.")
        node_config[key] = value
    client = client_by_id(config.data, str(node_config.get("client-id", "")))
    return client, site_files(node_config, client)


def _background(config: "PilotConfig") -> "Colour | None":
    from pilot_flwr.base import load_processor
    from pilot_flwr.data.federation import padding_colour

    processor = load_processor(config.model.path, config.model.revision)
    return padding_colour(config.data, processor.image_processor)


def _look(splits: "Splits", config: "PilotConfig", options: argparse.Namespace) -> None:
    """Look at the rows; those that several clients share, as a test file's, only once."""
    from rich.console import Console
    from rich.progress import Progress

    from pilot_flwr.data.check import check_split

    tokenize = {} if options.no_tokens else _tokenizers(config)
    seen: dict[object, SplitReport] = {}
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("rows", total=sum(len(e) for _, e in splits if e is not None))
        for index, (report, examples) in enumerate(splits):
            if examples is None:
                continue
            files = tuple(str(file.path) for file in examples.files)
            key = (report.split, files, examples.reading, examples.rows.tobytes())
            if key in seen:
                splits[index] = (replace(seen[key], client=report.client), examples)
            else:
                bars.update(bar, description=f"{report.client} {report.split}")
                seen[key] = check_split(
                    examples,
                    report,
                    tokenize=tokenize.get(report.split),
                    decode=not options.fast,
                    workers=options.workers,
                )
            bars.advance(bar, len(examples))


def _tokenizers(config: "PilotConfig") -> "dict[Split, Tokenize]":
    """Return what a run does with the rows of each split."""
    from pilot_flwr.base import known_config, load_processor, make_collator

    model = config.model
    collator = make_collator(
        model,
        load_processor(model.path, model.revision),
        known_config(model),
        max_length=config.train.max_length,
    )
    return {"train": collator.tokenize, "test": lambda example: (collator.prompt(example), [])}


def _print(reports: "list[SplitReport]", shared: list[tuple[str, str, int]], show: int) -> None:
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
    print(f"A run would stop at {', '.join(stopping)}." if stopping else "A run can start.")
