"""A small real federation on disk: the demo's mosaics as PNG, its questions as LLaVA JSON."""

import json
import shlex
from pathlib import Path

import yaml
from PIL import Image

from pilot_flwr.config.overrides import expand
from pilot_flwr.data import demo

SUFFIX = "Answer with one word."


def write_federation(
    folder: Path, *, tasks=("vqa", "counting"), train=12, test=4, clients=2, **settings
) -> Path:
    """Write files and ``federation.yaml`` into `folder`; return the YAML's path.

    The training file of the first task is an array, all others are JSONL. `settings` are more
    keys of the YAML.
    """
    files = {}
    for number, task in enumerate(tasks):
        for split, count in (("train", train), ("test", test)):
            rows = make_rows(folder, task, split, count)
            array = number == 0 and split == "train"
            text = json.dumps(rows, indent=1) if array else "\n".join(map(json.dumps, rows))
            (folder / task / f"{split}.json").write_text(text)
        files[task] = {
            "train": [f"{task}/train.json"],
            "test": [f"{task}/test.json"],
            "images": f"{task}/images",
            "prompt_suffix": SUFFIX,
        }
    content = {"tasks": list(tasks), "clients_per_task": clients, "files": files} | settings
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


BROKEN = ("test-2.png", "test-4.png", "test-7.png", "train-2.png", "train-5.png")
"""Images of `write_oblong_federation` that are absent, or end behind their header."""


def write_oblong_federation(folder: Path) -> str:
    """Write a federation of oblong images, some broken, into ``data/``; return its overrides."""
    (folder / "data").mkdir()
    path = write_federation(
        folder / "data",
        train=12,
        test=10,
        clients=1,
        train_examples=9,
        test_examples=8,
        image_aspect_ratio="pad",
        allowed_broken=0.5,
    )
    for file in sorted((folder / "data").glob("*/images/*.png")):
        with Image.open(file) as image:
            image.crop((0, 0, 32, 20)).save(file)
        if file.name in BROKEN[::2]:
            file.unlink()
        elif file.name in BROKEN:
            file.write_bytes(file.read_bytes()[:120])
    words = "seed=5 strategy.rounds=1 train.epochs=1 train.batch_size=2 evaluation.max_new_tokens=3"
    return shlex.join(expand([f"data={path}", *words.split()]))


def make_rows(folder: Path, task: str, split: str, count: int) -> list[dict]:
    """Write images and return their rows; the first row has two turns more and no image."""
    images = folder / task / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, example in enumerate(
        demo.client_examples(
            task, client_index=0, num_clients=9, split=split, num_examples=count, seed=0
        )
    ):
        name = f"{split}-{number}.png"
        example.images[0].read().save(images / name)
        question, answer = (turn.text for turn in example.turns)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        row = {"id": f"{split}{number}", "image": name, "conversations": turns}
        if number == 0:
            asked = {"train": "Which digits?", "test": "Which digit?"}[split]
            plain = [{"from": "human", "value": asked}, {"from": "gpt", "value": "0 1"}]
            row = {"id": 0, "conversations": plain + plain}
        rows.append(row | {"kind": answer})
    return rows
