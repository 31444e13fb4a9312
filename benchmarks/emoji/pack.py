"""Make the emoji pack: 853 concepts, each drawn by four houses, with names, groups and keywords.

    pip install "resvg-py==0.5.0"
    python benchmarks/emoji/pack.py                   # rewrites benchmarks/emoji/pack

The pictures, names and keywords come from npm packages of fixed versions, whose archives `npm pack`
downloads (or finds in ``--packages``) and whose hashes are checked. A concept is a code point or
sequence of an object-like group that all houses draw. Pictures have at most 64 x 64 pixels, on
white, and 32 colours each.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from resvg_py import svg_to_bytes

DEFAULT_OUT = Path(__file__).parent / "pack"
SIZE, COLOURS = 64, 32

HOUSES = {
    "noto": "@iconify-json/noto",
    "fluent": "@iconify-json/fluent-emoji-flat",
    "twemoji": "@iconify-json/twemoji",
    "openmoji": "@iconify-json/openmoji",
}
"""House → npm package."""

PACKAGES = {
    "@iconify-json/noto": (
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "@iconify-json/fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "@iconify-json/twemoji": (
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "@iconify-json/openmoji": (
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
    "unicode-emoji-json": (
        "0.9.0",
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    ),
    "emojilib": ("4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"),
}
"""npm package → version and SHA-256 of its archive."""

GROUPS = {
    "Food & Drink": "food",
    "Animals & Nature": "nature",
    "Travel & Places": "travel",
    "Objects": "object",
    "Activities": "activity",
}
"""Unicode's group of a concept → the word for it in answers."""

Files = Mapping[str, Any]


def read_package(name: str, folder: Path) -> dict[str, Any]:
    """Return a package's JSON files by name; download its archive into `folder` unless it is there.

    Raises `ValueError` if the archive has another hash.
    """
    version, expected = PACKAGES[name]
    archive = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        subprocess.run(command, cwd=folder, check=True)  # nosec B603  # fixed arguments, no shell
    content = archive.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{archive.name} has SHA-256 {found} but must have {expected}.")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {
            Path(member.name).name: json.load(tar.extractfile(member))  # type: ignore[arg-type]
            for member in tar.getmembers()
            if member.name.endswith(".json")
        }


def key_of(code: str) -> str:
    """Return a code point sequence without the variation selector, as all packages have it."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def svgs(files: Files) -> dict[str, str]:
    """Return a house's SVG documents by key."""
    icons = files["icons.json"]
    found = {}
    for code, name in files["chars.json"].items():
        icon = icons["icons"].get(name)
        if icon is not None:
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            found[key_of(code)] = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
    return found


def draw(svg: str) -> bytes:
    """Return a PNG of a document on white."""
    drawn = svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff")
    with Image.open(io.BytesIO(bytes(drawn))) as picture:
        small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def concepts(names: Files, keywords: Files) -> dict[str, dict[str, Any]]:
    """Return name, group and keywords of every object-like concept by key."""
    found = {}
    for emoji, row in names["data-by-emoji.json"].items():
        if row["group"] in GROUPS:
            key = key_of("-".join(f"{ord(letter):x}" for letter in emoji))
            own, *others = keywords["emoji-en-US.json"][emoji]
            found[key] = {
                "name": row["name"],
                "group": GROUPS[row["group"]],
                "keywords": [word for word in others if word != own],
            }
    return found


def main() -> None:
    """Build the pack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--packages", type=Path, help="folder of the packages' archives")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.packages or Path(temporary)
        files = {name: read_package(name, folder) for name in PACKAGES}
    houses = {house: svgs(files[package]) for house, package in HOUSES.items()}
    known = concepts(files["unicode-emoji-json"], files["emojilib"])
    keys = sorted(key for key in known if all(key in house for house in houses.values()))
    options.out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(options.out / "pictures.zip", "w") as archive:
        for house, documents in houses.items():
            for key in keys:
                archive.writestr(zipfile.ZipInfo(f"{house}/{key}.png"), draw(documents[key]))
    text = json.dumps({key: known[key] for key in keys}, ensure_ascii=False, indent=1)
    (options.out / "concepts.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(keys)} concepts of {len(houses)} houses in {options.out}")


if __name__ == "__main__":
    main()
