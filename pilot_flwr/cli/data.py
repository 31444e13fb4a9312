"""``pilot-flwr data convert`` and ``data check``: prepare data before a run."""

import json
import os
import re
import shlex
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer
from typer.core import TyperCommand

from pilot_flwr.cli.common import FAILURE, SUCCESS, Overrides, print_table
from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:  # heavy imports stay inside commands
    from pilot_flwr.client.data_check import SharedRows
    from pilot_flwr.data.validation import SplitStatistics

_NODE_SETTING = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")


class SeveralValues(TyperCommand):
    """A command whose repeatable options take several values each: ``--annotations A B``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, as click expects."""
        repeatable = {
            name
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        repeated: list[str] = []
        option, previous = "", ""
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument in repeatable else ""
            elif option and previous != option:
                repeated.append(option)
            repeated.append(argument)
            previous = argument
        return super().parse_args(ctx, repeated)


def convert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The data set.")],
    split: Annotated[str, typer.Option(help="train, val or test.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A new JSONL file.")],
    annotations: Annotated[
        list[Path] | None,
        typer.Option(metavar="F...", help="The data set's annotation files."),
    ] = None,
    questions: Annotated[
        list[Path] | None,
        typer.Option(metavar="F...", help="Its question files (vqav2) or its splits (scienceqa)."),
    ] = None,
    boxes: Annotated[
        Literal["padded", "image"],
        typer.Option(
            help="Express boxes as fractions of the padded square that LLaVA sees, or of the image."
        ),
    ] = "padded",
    image_prefix: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="Subfolder of the image folder, such as val2017, to prepend to every image name.",
            show_default=False,
        ),
    ] = "",
    skip_unusable: Annotated[
        bool,
        typer.Option(
            "--skip-unusable",
            help="Skip and count entries that cannot be converted, instead of failing.",
        ),
    ] = False,
) -> int:
    """Convert a data set's own annotation files to LLaVA JSONL.

    NAME is one of gqa, ocr_vqa, coco_captions, coco_karpathy, vqav2, textvqa, scienceqa, boxes.
    Files and options of each: docs/reference/data.md.

    Example: `pilot-flwr data convert gqa --annotations train_balanced_questions.json
    --split train --out gqa/train.jsonl`
    """
    from pilot_flwr.data import converters
    from pilot_flwr.data.converters.common import Sources

    sources = Sources(
        tuple(annotations or ()),
        tuple(questions or ()),
        split,
        padded=boxes == "padded",
        image_prefix=image_prefix,
    )
    result = converters.convert(name, sources, out, skip_unusable=skip_unusable)
    print(f"{out}: {result.rows} rows about {result.images} images")
    for reason, number in sorted(result.skipped.items()):
        print(f"skipped {number}: {reason}")
    return SUCCESS


def check(
    overrides: Overrides = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read only image headers, without decoding.")
    ] = False,
    no_tokens: Annotated[
        bool,
        typer.Option("--no-tokens", help="Do not tokenize; needs no processor of a base model."),
    ] = False,
    node_config: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG",
            help="Check the data of one real site: its node config, as KEY=VALUE pairs or a .toml "
            "file, as for `flower-supernode`.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write all figures to a file."),
    ] = None,
    show: Annotated[int, typer.Option(metavar="N", help="Number of broken rows to list.")] = 10,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N", help="Threads for images.", show_default="the number of CPU cores"
        ),
    ] = os.cpu_count() or 1,
) -> int:
    """Check every row and image of a federation before a run.

    Every row of every client is checked as in training: structure, images, length in tokens. The
    command reports counts, broken rows and statistics of the answers.

    Exit code: 0 a run can start, 1 a run would fail, 2 wrong usage or configuration.

    Example: `pilot-flwr data check data=my-federation.yaml model=llava-1.5-7b`
    """
    from rich.console import Console
    from rich.progress import Progress

    from pilot_flwr.client.data_check import (
        check_splits,
        count_overlaps,
        find_shared_rows,
        open_splits,
    )
    from pilot_flwr.config.loading import load_config
    from pilot_flwr.config.overrides import expand, with_folder
    from pilot_flwr.config.rules import at_least

    at_least("--show", show, 0)
    at_least("--workers", workers, 1)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"`--json` is {str(json_file)!r}, but its folder does not exist.")
    node = None if node_config is None else parse_node_config(node_config)
    expanded = expand(overrides or ())
    config, _ = with_folder(load_config(shlex.join(expanded)), expanded)
    if config.data.source != "llava":
        raise ConfigError("`data.source` must be llava: only files can be checked.")
    config, splits = open_splits(config, node, tokens=not no_tokens)
    sources = {file.path.resolve() for _, rows in splits if rows is not None for file in rows.files}
    if json_file is not None and json_file.resolve() in sources:
        raise ConfigError(
            f"`--json` is {str(json_file)!r} but must not be one of the data's files."
        )
    shared = find_shared_rows(splits)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        rows = bars.add_task("rows", total=sum(len(e) for _, e in splits if e is not None))
        figures = check_splits(
            config,
            splits,
            decode=not fast,
            tokens=not no_tokens,
            workers=workers,
            progress=lambda name, done: bars.update(rows, description=name, advance=done),
        )
    if not fast:
        count_overlaps(config, node, figures, workers=workers)
    unchecked = ["pixels and overlap (`--fast`)"] * fast + ["tokens (`--no-tokens`)"] * no_tokens
    official = config.data.image_reading == "official"
    _print(figures, shared, show, unchecked, official=official)
    if json_file is not None:
        _write_json(json_file, figures, shared)
    return FAILURE if any(split.stops for split in figures) else SUCCESS


def parse_node_config(text: str) -> dict[str, Any]:
    """Parse a node config as ``flower-supernode`` does: KEY=VALUE pairs or a TOML file's name."""
    if text.endswith(".toml"):
        try:
            return tomllib.loads(Path(text).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"`--node-config` names {text!r}: {error}.") from None
    values: dict[str, Any] = {}
    rest = text.strip()
    while rest:
        pair = _NODE_SETTING.match(rest)
        try:
            if pair is None:
                raise ValueError
            values |= tomllib.loads(f"{pair[1]} = {pair[2]}")
        except ValueError:
            raise ConfigError(
                f"`--node-config` has {rest!r} but must be KEY=VALUE pairs with every string "
                "quoted, or the name of a .toml file."
            ) from None
        rest = rest[pair.end() :].strip()
    return values


def _write_json(path: Path, splits: "list[SplitStatistics]", shared: "list[SharedRows]") -> None:
    found = {
        "splits": [
            split.summary() | {"broken_rows": [asdict(problem) for problem in split.problems]}
            for split in splits
        ],
        "shared_rows": [{"splits": [a, b], "rows": rows} for a, b, rows in shared],
    }
    try:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"`--json` cannot be written: {error.strerror}.") from None


def _print(
    splits: "list[SplitStatistics]",
    shared: "list[SharedRows]",
    show: int,
    unchecked: list[str],
    *,
    official: bool,
) -> None:
    _print_figures(splits)
    _print_looks(splits, official=official)
    for first, second, rows in shared:
        print(f"{first} and {second} have {rows} rows in common.")
    for split in splits:
        if split.overlap.rows:
            print(f"{split.client}: {split.overlap}.")
    if any(split.overlap.exceeds(split.allowed_overlap) for split in splits):
        print(
            "Remove them from one of the files, or allow a share of test rows: "
            "`data.allowed_overlap`, at a real site `allowed-overlap` in its node config."
        )
    problems = [
        f"{split.client} {split.split}: {line}"
        for split in splits
        for line in ([split.error] if split.error else [])
        + [p.message + (f" ({p.image})" if p.image else "") for p in split.problems]
    ]
    for line in problems[:show]:
        print(line)
    if len(problems) > show:
        print(f"... and {len(problems) - show} more; list them with `--show` or `--json`.")
    stopping = [f"{split.client} {split.split}" for split in splits if split.stops]
    if stopping:
        print(f"A run would fail at {', '.join(stopping)}.")
    elif unchecked:
        print(f"No errors found; not checked: {', '.join(unchecked)}.")
    else:
        print("A run can start.")


def _print_looks(splits: "list[SplitStatistics]", *, official: bool) -> None:
    """Print how many images depend on `data.image_reading`."""
    from pilot_flwr.formatting import count

    white, turned = ("dropped", "ignored") if official else ("shown on white", "applied")
    reading = "official" if official else "viewer"
    for split in splits:
        if split.transparent or split.turned:
            print(
                f"{split.client} {split.split}: {count(split.transparent, 'image')} with "
                f"transparency ({white}), {split.turned} with an EXIF orientation ({turned}): "
                f"`data.image_reading` is {reading}."
            )


def _print_figures(splits: "list[SplitStatistics]") -> None:
    from rich.table import Table
    from rich.text import Text

    titles = ("client", "split", "rows", "broken", "images", "turns", "tokens: median, max")
    table = Table(*titles, "labelled: mean", "most frequent answer")
    for split in splits:
        row = split.summary()
        share = row["most_frequent_answer_share"]
        answer = f"{share:.0%} {row['most_frequent_answer']!r}" if share is not None else ""
        tokens = (
            "" if row["tokens_max"] is None else f"{row['tokens_median']:g}, {row['tokens_max']}"
        )
        cells = (split.client, split.split, split.rows, split.rows - split.usable)
        figures = (split.images, row["turns_mean"], tokens, row["labelled_tokens_mean"], answer)
        table.add_row(*(Text("" if c is None else str(c)) for c in (*cells, *figures)))
    print_table(table)
