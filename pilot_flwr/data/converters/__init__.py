"""Convert the annotation files of data sets to LLaVA JSONL.

To add a data set, write a function that yields its entries and one that turns an entry into a
row, and add both to `CONVERTERS`. Rows keep the files' order and have unique ids. They have no
prompt suffix, which `data.files.<task>.prompt_suffix` sets.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pilot_flwr.config.rules import one_of
from pilot_flwr.data.converters import captions_boxes, vqa
from pilot_flwr.data.converters.common import SPLITS, Entry, Row, Sources, Unusable
from pilot_flwr.data.llava import Reading, to_example
from pilot_flwr.errors import ConfigError, DataError


@dataclass(frozen=True)
class Converter:
    """Functions that read a data set's entries and convert one to a row, and its files."""

    entries: Callable[[Sources], Iterator[Entry]]
    row: Callable[[Entry, Sources], Row]
    annotations: str
    questions: str = ""


CONVERTERS: dict[str, Converter] = {
    "gqa": Converter(vqa.gqa_entries, vqa.gqa_row, "*_questions.json"),
    "ocr_vqa": Converter(vqa.ocr_vqa_entries, vqa.ocr_vqa_row, "dataset.json"),
    "coco_captions": Converter(
        captions_boxes.coco_entries, captions_boxes.caption_row, "captions_*.json"
    ),
    "coco_karpathy": Converter(
        captions_boxes.karpathy_entries, captions_boxes.caption_row, "dataset_coco.json"
    ),
    "vqav2": Converter(
        vqa.vqav2_entries,
        vqa.vqav2_row,
        "v2_mscoco_*_annotations.json",
        "v2_OpenEnded_mscoco_*_questions.json",
    ),
    "textvqa": Converter(vqa.textvqa_entries, vqa.textvqa_row, "TextVQA_*.json"),
    "scienceqa": Converter(
        vqa.scienceqa_entries, vqa.scienceqa_row, "problems.json", "pid_splits.json"
    ),
    "boxes": Converter(captions_boxes.box_entries, captions_boxes.box_row, "a list of expressions"),
}
"""Converters by data set."""


@dataclass(frozen=True)
class ConversionResult:
    """Rows written, distinct images among them, and skipped entries by reason."""

    rows: int
    images: int
    skipped: dict[str, int]


def convert(
    name: str, sources: Sources, out: Path, *, skip_unusable: bool = False
) -> ConversionResult:
    """Write a data set's split as JSONL; `out` appears only when it is complete.

    An entry that cannot become a row raises `Unusable`, or is counted with `skip_unusable`.
    """
    converter = _checked(name, sources, out)
    prefix = sources.image_prefix and f"{sources.image_prefix.rstrip('/')}/"
    part = out.with_name(f".{out.name}.part")
    ids: set[str] = set()
    images: set[str] = set()
    skipped: Counter[str] = Counter()
    try:
        with open(part, "wb") as file:
            for entry in converter.entries(sources):
                try:
                    row = converter.row(entry, sources)
                    if "image" in row:
                        row["image"] = prefix + row["image"]
                    line = _line(row, entry.origin)
                except Unusable as error:
                    if not skip_unusable:
                        raise
                    skipped[error.reason] += 1
                    continue
                if entry.id in ids:
                    raise DataError(f"{entry.origin}: the id {entry.id!r} came before.")
                ids.add(entry.id)
                images.update([row["image"]] if "image" in row else [])
                file.write(line)
        if not ids:
            raise DataError(f"There is no row for split {sources.split!r}.")
        os.replace(part, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)
    return ConversionResult(len(ids), len(images), dict(skipped))


def _line(row: Row, origin: str) -> bytes:
    """Return a row as a line of JSONL; raise `Unusable` for a row that could not be read back."""
    try:
        to_example(row, "", origin, Reading(images=Path()))
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        reason = "A text has an unpaired surrogate."
    except DataError as error:
        reason = str(error).removeprefix(origin).lstrip(" ,:")
    raise Unusable(origin, reason)


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
        raise ConfigError(f"`--image-prefix` is {prefix!r} but must be relative and without '..'.")
    if out.exists():
        raise ConfigError(f"`--out` is {str(out)!r} but must be a new file: this one exists.")
    return converter
