"""Checkpoints on disk: the shipped ones, their files, and a hash of their weights.

A checkpoint is the name of a shipped one, a local folder or a Hugging Face id. Shipped ones are
plain Hugging Face folders under ``assets/``. Flower's app bundle carries text files only, so such a
folder also holds `BUNDLE`, its other files in base64; a package installed from an app bundle
assembles the folder once, in the user's cache.

Nothing here needs torch or transformers, so that a client answers the roster query quickly.
"""

import base64
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.run.atomic import read_json

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLE = "bundle.json"
_BUNDLED = {".safetensors", ".jinja"}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"

_PROJECTOR = re.compile(r"(?:.+\.)?(?:multi_modal_projector|connector|merger)\.(.+)")
"""Names of the projector's tensors in checkpoints of all families."""


def projector_key(name: str) -> str:
    """Return a checkpoint tensor's name within the projector, empty if it is not a part of it."""
    match = _PROJECTOR.fullmatch(name)
    return match[1] if match else ""


def checkpoint_path(path: str) -> str:
    """Return the folder of a shipped checkpoint, or `path` itself (a folder or a hub id)."""
    folder = ASSETS / path
    if not (folder / BUNDLE).is_file():
        return path
    whole = all((folder / name).is_file() for name in _bundled_names(folder))
    return str(folder if whole else _assemble(folder))


@functools.cache  # a file of two megabytes, needed for every message
def _bundled_names(folder: Path) -> tuple[str, ...]:
    """Return the names of a shipped checkpoint's files that an app bundle lacks."""
    return tuple(json.loads((folder / BUNDLE).read_text(encoding="utf-8")))


def locate(config: ModelConfig) -> str:
    """Return `checkpoint_path`, or raise `ModelError` for a missing local folder."""
    if config.path.startswith(("/", ".", "~")) and not os.path.isdir(config.path):
        raise ModelError(f"`model.path` is {config.path!r}, but there is no such folder.")
    return checkpoint_path(config.path)


def files_stamp(path: str) -> tuple[tuple[object, ...], ...]:
    """Return a stamp that changes whenever a file of a local checkpoint does.

    It is empty for a checkpoint in the hub's cache, which never changes.
    """
    folder = checkpoint_path(path)
    if not os.path.isdir(folder):
        return ()
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return tuple(sorted((n, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in found))


def reference_config(path: str) -> Path | None:
    """Return the shipped configuration of a known hub checkpoint, to plan without a download."""
    file = ASSETS / "configs" / path.replace("/", "--") / "config.json"
    return file if file.is_file() else None


def find_file(config: ModelConfig, name: str, *, download: bool = True) -> str:
    """Return the path of a checkpoint's file; raise OSError or ValueError if there is none."""
    place = locate(config)
    if os.path.isdir(place):
        if not (file := Path(place, name)).is_file():
            raise FileNotFoundError(f"{place} has no file {name}")
        return str(file)
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    # Without an import of httpx:
    if not (download or Path(HF_HUB_CACHE, f"models--{place.replace('/', '--')}").is_dir()):
        raise FileNotFoundError(f"{place} is not in {HF_HUB_CACHE}")
    return huggingface_hub.hf_hub_download(
        place, name, revision=config.revision or None, local_files_only=not download
    )


def projector_files(config: ModelConfig) -> list[str]:
    """Return the safetensors files that hold the projector, downloaded if need be."""
    try:
        index = find_file(config, _INDEX)
    except OSError:  # one file without an index; if it is missing too, the error follows below
        names = [_SINGLE]
    else:
        names = sorted({file for name, file in _weight_map(index).items() if projector_key(name)})
    try:
        return [find_file(config, name) for name in names]
    except OSError as error:
        raise ModelError(
            f"`model.path` is {config.path!r}, whose weights are missing: {error}"
        ) from error


UNKNOWN = ""
"""Hash of weights that are not completely on this machine."""


class WeightsSample(NamedTuple):
    """Hashes of the projector and of every tensor's first and last row; `UNKNOWN` if missing."""

    projector: str
    whole: str


def weights_sample(config: ModelConfig) -> WeightsSample:
    """Hash a sample of a base model's weights, without reading gigabytes or downloading.

    Reads the first and last row of every tensor, and the whole projector, from which every task
    adapter starts. Other values or another precision give another hash. Versions of transformers
    write the same model differently, so the hash ignores the tensors' order, names and files,
    counts equal ones once (tied weights) and skips those of integers (position ids).
    """
    files, complete = _local_files(config)
    projector: dict[str, str] = {}
    sampled: set[str] = set()
    for name, kind, rows, whole in (tensor for file in files for tensor in _tensors(file)):
        sampled.add(_digest(kind + rows))
        if key := projector_key(name):
            projector[key] = _digest(kind + whole)
    return WeightsSample(
        _digest(json.dumps(projector, sort_keys=True).encode())[:12] if projector else UNKNOWN,
        _digest(" ".join(sorted(sampled)).encode())[:12] if complete else UNKNOWN,
    )


def _tensors(file: str) -> Iterator[tuple[str, bytes, bytes, bytes]]:
    """Yield every tensor's name, type, first and last row and, for the projector, all bytes."""
    with safe_open(file, framework="np"):
        pass  # raises for a truncated file
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            if not tensor["dtype"].startswith(("F", "BF")):
                continue
            shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
            start, size = 8 + length + begin, end - begin
            row = size // shape[0] if shape and shape[0] else 0
            rows = os.pread(stream.fileno(), row, start)
            rows += os.pread(stream.fileno(), row, start + size - row)
            whole = os.pread(stream.fileno(), size, start) if projector_key(name) else b""
            yield name, f"{shape} {tensor['dtype']}".encode(), rows, whole


def check_weights(config: ModelConfig) -> None:
    """Raise `ModelError` for a damaged or missing file of the weights on this machine.

    Reads the index and the files' headers only. Files of a hub checkpoint may still be downloaded.
    """
    index = _local(config, _INDEX)
    try:
        weights = _weight_map(index) if index else {}
    except (ValueError, KeyError, TypeError):
        assert index is not None
        with open(index, "rb") as stream:
            raise _damaged(config, _INDEX, _kind(stream.read(64)) or "not an index") from None
    for name in sorted(set(weights.values())) if index else [_SINGLE]:
        file = _local(config, name)
        if file is None:
            if index and os.path.isdir(locate(config)):
                raise _damaged(config, name, f"missing, though {_INDEX} names it")
            continue
        defect, tensors = _read_header(file)
        absent = [tensor for tensor, place in weights.items() if place == name] if index else []
        absent = [tensor for tensor in absent if tensor not in tensors]
        if not defect and absent:
            defect = f"without tensor {absent[0]!r}, which {_INDEX} expects there"
        if defect:
            raise _damaged(config, name, defect)


def check_template(config: ModelConfig) -> None:
    """Raise `ModelError` for a local folder whose chat template is missing or text-only.

    Only files are read, without transformers; loading the processor also renders the template.
    """
    folder = Path(locate(config))
    if not (folder / "tokenizer_config.json").is_file():
        return  # a hub id, or a configuration alone
    found = "".join(
        path.read_text(encoding="utf-8", errors="replace")
        for pattern in ("chat_template.jinja", "additional_chat_templates/*.jinja")
        for path in folder.glob(pattern)
    )
    for name in ("chat_template.json", "processor_config.json"):  # the tokenizer's is not used
        found += str(read_json(folder / name).get("chat_template") or "")
    if not found.strip():
        raise unfit_template(config.path, "has no chat template")
    if "image" not in found and "type" not in found:
        raise unfit_template(config.path, "has a text-only chat template")


def unfit_template(path: str, defect: str) -> ModelError:
    """Return the error for a chat template that cannot be used."""
    return ModelError(
        f"`model.path` is {path!r}, which {defect}. Put the chat template of an image-text model "
        "into chat_template.jinja there."
    )


def _damaged(config: ModelConfig, name: str, defect: str) -> ModelError:
    return ModelError(
        f"`model.path` is {config.path!r}, whose file {name} is {defect}. Download the file again."
    )


def _read_header(file: str) -> tuple[str, set[str]]:
    """Return what is wrong with a safetensors file by its header and size, and its tensors."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        begin = stream.read(64)
        if kind := _kind(begin):
            return kind, set()
        length = int.from_bytes(begin[:8], "little")
        if size < 8:
            return f"cut off: it has {size} bytes", set()
        if not begin[8:].lstrip().startswith(b"{"):
            return "not a safetensors file", set()
        if size < 8 + length:
            return f"cut off: it has {size:,} bytes, fewer than its header", set()
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "not a safetensors file: its header cannot be read", set()
    expected = 8 + length + end
    if size < expected:
        return f"cut off: it has {size:,} of {expected:,} bytes", set(header)
    if size > expected:
        return f"damaged: it has {size:,} bytes but its header names {expected:,}", set(header)
    return "", set(header)


def _kind(begin: bytes) -> str:
    """Return what a file is that was stored in place of another, or nothing."""
    if not begin:
        return "empty"
    if begin.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer instead of the weights (run `git lfs pull`)"
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page, as a failed download leaves it"
    return ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _weight_map(index: str) -> dict[str, str]:
    weights: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return weights


def _local_files(config: ModelConfig) -> tuple[list[str], bool]:
    """Return the safetensors files on this machine, and whether they are complete."""
    index = _local(config, _INDEX)
    names = sorted(set(_weight_map(index).values())) if index else [_SINGLE]
    files = [_local(config, name) for name in names]
    return [file for file in files if file], all(files)


def _local(config: ModelConfig, name: str) -> str | None:
    try:
        return find_file(config, name, download=False)
    except OSError:
        return None


def user_cache() -> Path:
    """Return this package's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pilot-flwr"


def write_bundle(folder: Path) -> None:
    """Write a checkpoint folder's `BUNDLE` of the files that Flower's app bundle leaves out."""
    bundle = {
        path.name: base64.b64encode(path.read_bytes()).decode("ascii")
        for path in sorted(folder.iterdir())
        if path.suffix in _BUNDLED
    }
    (folder / BUNDLE).write_text(json.dumps(bundle, indent=0) + "\n", encoding="utf-8")


def _assemble(folder: Path) -> Path:
    """Assemble the folder in the cache; its name is the hash of its content."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    cache = user_cache()
    target = cache / f"{folder.name}-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache))
    try:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        bundle = json.loads((folder / BUNDLE).read_text(encoding="utf-8"))
        for name, content in bundle.items():
            (temporary / name).write_bytes(base64.b64decode(content))
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
