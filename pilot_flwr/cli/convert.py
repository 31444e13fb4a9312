"""``pilot-flwr data convert``: a data set's own annotation files as LLaVA JSONL."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "convert",
        help="turn a data set's own annotation files into LLaVA JSONL",
        description="Turn a data set's own annotation files into LLaVA JSONL. NAME is one of "
        "gqa, ocr_vqa, coco_captions, coco_karpathy, vqav2, textvqa, scienceqa, boxes. Files and "
        "options of each: docs/paper.md.",
        epilog="example: pilot-flwr data convert gqa --annotations train_balanced_questions.json "
        "--split train --out gqa/train.jsonl",
    )
    parser.add_argument("name", metavar="NAME", help="the data set")
    for option, text in (
        ("--annotations", "the data set's annotation files"),
        ("--questions", "its question files (vqav2) or its splits (scienceqa)"),
    ):
        parser.add_argument(
            option, type=Path, nargs="+", action="extend", default=[], metavar="F", help=text
        )
    parser.add_argument("--split", required=True, help="train, val or test")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new JSONL file")
    parser.add_argument(
        "--boxes",
        choices=("padded", "image"),
        default="padded",
        help="boxes are shares of the square that LLaVA pads an image to, or of the image itself",
    )
    parser.add_argument(
        "--image-prefix",
        default="",
        metavar="FOLDER",
        help="put before every image's name, such as val2017: a folder inside the image folder",
    )
    parser.add_argument(
        "--skip-unusable",
        action="store_true",
        help="leave out entries that cannot become a row, and count them; otherwise they are "
        "an error",
    )
    parser.set_defaults(handler=_convert)


def _convert(options: argparse.Namespace) -> int:
    from pilot_flwr.data.converters import convert
    from pilot_flwr.data.converters.common import Sources

    sources = Sources(
        tuple(options.annotations),
        tuple(options.questions),
        options.split,
        padded=options.boxes == "padded",
        image_prefix=options.image_prefix,
    )
    report = convert(options.name, sources, options.out, skip_unusable=options.skip_unusable)
    print(f"{options.out}: {report.rows} rows about {report.images} images")
    for reason, number in sorted(report.skipped.items()):
        print(f"left out {number}: {reason}")
    return 0
