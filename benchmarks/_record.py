"""Write a benchmark's result file: figures, command, machine, versions, commit.

Usage, from ``benchmarks/<name>.py`` (scripts of this folder import each other by plain name)::

    from _record import write_record

    write_record(path, results, packages=("numpy", "torch"))
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write_record(path: Path, results: Mapping[str, Any], *, packages: Sequence[str]) -> None:
    """Write `results` with the command, machine, versions, commit and date to a JSON file.

    Parameters
    ----------
    path : Path
        The file to write; its folder is created.
    results : mapping
        The figures, in JSON types, with units in the names.
    packages : sequence of str
        Distributions whose versions affect the figures.
    """
    record = {
        "command": command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(packages)},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def command() -> str:
    """Return the command as typed from the repository's root, without folders of this machine."""
    script = Path(sys.argv[0]).resolve()
    inside = script.is_relative_to(ROOT)
    shown = script.relative_to(ROOT).as_posix() if inside else f"benchmarks/{script.name}"
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python", shown, *words])


def commit() -> dict[str, Any]:
    """Return the checked-out commit and whether tracked files, results aside, differ from it."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return {"id": head, "dirty": None if changed is None else bool(changed)}


def machine() -> dict[str, Any]:
    """Return CPU model, usable cores, memory, load and system of this machine, not its name."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the installed version of each distribution, None if it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(  # nosec B603 B607  # no shell; the user's own git
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an unpacked archive, without git
    return answer.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
