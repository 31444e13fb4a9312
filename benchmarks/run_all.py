"""Run every benchmark, one after the other, each in its own process.

Run ``python benchmarks/run_all.py`` (hours, 10 GiB of memory, 12 GB of disk) on an idle
machine to update ``benchmarks/results``, or ``--quick`` for a smoke test of all. To add a
benchmark, add its file (or a folder with a ``run.py``) to this folder, its name to `BENCHMARKS` and
its rows to ``_rows.py``.
Without a GPU the GPU benchmark is skipped, with a message.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
BENCHMARKS = (
    "connector",
    "aggregation",
    "sketch",
    "server_memory",
    "object_stores",
    "clients",
    "client_session",
    "demo",
    "rows",
    "plan",
    "families",
    "privacy",
    "payload",
    "deployment",
    "engines",
    "import_time",
    "training_step",
    "gpu",
)


def script(benchmark: str) -> Path:
    """Return the file that runs a benchmark."""
    folder = FOLDER / benchmark
    return folder / "run.py" if folder.is_dir() else FOLDER / f"{benchmark}.py"


def run_demo(folder: Path) -> None:
    """Run the demo in `folder`; ``demo.py`` reads its events."""
    program = Path(sys.executable).parent / "pilot-flwr"
    command = [str(program), "run", "experiment=demo", f"run.folder={folder}"]
    subprocess.run(command, check=True)  # nosec B603  # no shell, this package's program


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all benchmarks; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, write nothing")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        demo = Path(name) / "demo"
        for benchmark in BENCHMARKS:
            print(f"== {benchmark}", flush=True)
            if benchmark == "gpu" and not options.quick and not torch.cuda.is_available():
                print("skipped: no GPU", flush=True)
                continue
            extra = ["--quick"] if options.quick else []
            if benchmark == "demo" and not options.quick:
                run_demo(demo)
                extra = [str(demo)]
            command = [sys.executable, str(script(benchmark)), *extra]
            subprocess.run(command, check=True)  # nosec B603  # no shell, this package's program


if __name__ == "__main__":
    main()
