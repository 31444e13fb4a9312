"""Checkpoints that ship with the package, wherever the package runs.

A checkpoint is a plain Hugging Face folder under ``assets/``. Flower's app bundle carries text
files only, so a folder also holds `BUNDLE`, its other files in base64. Where the package runs
from such a bundle, the folder is put together once in the user's cache.
"""

import base64
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLE = "bundle.json"
_BUNDLED = {".safetensors", ".jinja"}


def checkpoint_path(path: str) -> str:
    """Return the folder of a shipped checkpoint, or `path` itself (a folder or a hub id)."""
    folder = ASSETS / path
    if not (folder / BUNDLE).is_file():
        return path
    bundle = json.loads((folder / BUNDLE).read_text(encoding="utf-8"))
    whole = all((folder / name).is_file() for name in bundle)
    return str(folder if whole else _assemble(folder, bundle))


def reference_config(path: str) -> str | None:
    """Return the file with a well-known hub checkpoint's configuration, if the package has it.

    It answers questions about the checkpoint's size on a machine that does not have it.
    """
    file = ASSETS / "configs" / f"{path.replace('/', '--')}.json"
    return str(file) if file.is_file() else None


def write_bundle(folder: Path) -> None:
    """Write `BUNDLE` of a checkpoint folder: the files that Flower's app bundle leaves out."""
    bundle = {
        path.name: base64.b64encode(path.read_bytes()).decode("ascii")
        for path in sorted(folder.iterdir())
        if path.suffix in _BUNDLED
    }
    (folder / BUNDLE).write_text(json.dumps(bundle, indent=0) + "\n", encoding="utf-8")


def _assemble(folder: Path, bundle: dict[str, str]) -> Path:
    """Put the folder together in the cache; its name is the hash of its content."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pilot-flwr"
    target = cache / f"{folder.name}-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache))
    try:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        for name, content in bundle.items():
            (temporary / name).write_bytes(base64.b64decode(content))
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
