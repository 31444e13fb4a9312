"""Data sets' own annotation files as LLaVA JSONL.

To add a data set, write a function that yields its entries and one that makes a row of an
entry, and add both to `CONVERTERS`. Rows come in the files' order and have unique ids; prompt
suffixes are not theirs (`data.files.<task>.prompt_suffix`).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pilot_flwr.config.rules import one_of
from pilot_flwr.data.converters import captions_boxes as from_boxes
from pilot_flwr.data.converters import captions_boxes as from_captions
from pilot_flwr.data.converters import vqa as from_vqa
from pilot_flwr.data.converters.common import SPLITS, Entry, Row, Sources, Unusable
from pilot_flwr.errors import ConfigError, DataError


@dataclass(frozen=True)
class Converter:
    """A data set: how its entries are read, and how one becomes a row.

    Parameters
    ----------
    entries : callable
        Yields the split's entries of the files.
    row : callable
        Makes a row of an entry, or raises `Unusable`.
    annotations : str
        The files that ``--annotations`` names.
    questions : str
        The files that ``--questions`` names; empty if the data set has but one kind.
    """

    entries: Callable[[Sources], Iterator[Entry]]
    row: Callable[[Entry, Sources], Row]
    annotations: str
    questions: str = ""


CONVERTERS: dict[str, Converter] = {
    "gqa": Converter(from_vqa.gqa_entries, from_vqa.gqa_row, "*_questions.json"),
    "ocr_vqa": Converter(from_vqa.ocr_vqa_entries, from_vqa.ocr_vqa_row, "dataset.json"),
    "coco_captions": Converter(
        from_captions.coco_entries, from_captions.caption_row, "captions_*.json"
    ),
    "coco_karpathy": Converter(
        from_captions.karpathy_entries, from_captions.caption_row, "dataset_coco.json"
    ),
    "vqav2": Converter(
        from_vqa.vqav2_entries,
        from_vqa.vqav2_row,
        "v2_mscoco_*_annotations.json",
        "v2_OpenEnded_mscoco_*_questions.json",
    ),
    "textvqa": Converter(from_vqa.textvqa_entries, from_vqa.textvqa_row, "TextVQA_*.json"),
    "scienceqa": Converter(
        from_vqa.scienceqa_entries, from_vqa.scienceqa_row, "problems.json", "pid_splits.json"
    ),
    "boxes": Converter(from_boxes.box_entries, from_boxes.box_row, "a list of expressions"),
}
"""Converter by the name of its data set."""


@dataclass(frozen=True)
class Report:
    """Rows written, different images among them, and entries left out by reason."""

    rows: int
    images: int
    skipped: dict[str, int]


def convert(name: str, sources: Sources, out: Path, *, skip_unusable: bool = False) -> Report:
    """Write a data set's split as JSONL.

    Parameters
    ----------
    name : str
        A key of `CONVERTERS`.
    sources : Sources
        Annotation files and split.
    out : Path
        A new file; it is there only once it is whole.
    skip_unusable : bool
        Leave entries out, and count them, that cannot become a row; otherwise they raise.

    Raises
    ------
    ConfigError
        An unknown name or split, files missing or superfluous, a prefix that leads out of the
        image folder, or `out` exists.
    DataError
        A file or an entry is not as it must be, an id comes twice, or there is no row.
    """
    converter = _checked(name, sources, out)
    part = out.with_name(f".{out.name}.part")
    ids: set[str] = set()
    images: set[str] = set()
    skipped: Counter[str] = Counter()
    try:
        with open(part, "wb") as file:
            for entry in converter.entries(sources):
                try:
                    row = converter.row(entry, sources)
                except Unusable as error:
                    if not skip_unusable:
                        raise
                    skipped[error.reason] += 1
                    continue
                if entry.id in ids:
                    raise DataError(f"{entry.origin}: the id {entry.id!r} came before.")
                ids.add(entry.id)
                if "image" in row:
                    row["image"] = _placed(sources.image_prefix, row["image"])
                    images.add(row["image"])
                # Half a surrogate pair becomes "?", as the parser would have it.
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        if not ids:
            raise DataError(f"There is no row for split {sources.split!r}.")
        os.replace(part, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)
    return Report(len(ids), len(images), dict(skipped))


def _placed(prefix: str, image: str) -> str:
    return f"{prefix.rstrip('/')}/{image}" if prefix else image


def _checked(name: str, sources: Sources, out: Path) -> Converter:
    one_of("NAME", name, tuple(CONVERTERS))
    one_of("--split", sources.split, SPLITS)
    converter = CONVERTERS[name]
    if not sources.annotations:
        raise ConfigError(f"`--annotations` is empty but must name {converter.annotations}.")
    if converter.questions and not sources.questions:
        raise ConfigError(f"`--questions` is empty but must name {converter.questions}.")
    if sources.questions and not converter.questions:
        raise ConfigError(f"`--questions` is given, but {name!r} has only `--annotations`.")
    prefix = sources.image_prefix
    if prefix and (prefix.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", prefix)):
        raise ConfigError(
            f"`--image-prefix` is {prefix!r} but must be a folder inside the image folder: not "
            "absolute, and without '..'."
        )
    if out.exists():
        raise ConfigError(f"`--out` is {str(out)!r} but must be a new file: this one exists.")
    return converter
