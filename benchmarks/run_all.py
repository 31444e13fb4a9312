"""Run every benchmark, one after the other, each in a process of its own.

Run ``python benchmarks/run_all.py`` (about 45 minutes, 7 GiB) on a machine that does nothing else
to renew ``benchmarks/results``, or ``--quick`` to see that all of them work. To add a benchmark,
add its file (or a folder with a ``run.py``) to this folder and a row to `BENCHMARKS`, and its rows
to ``_rows.py``. What needs a GPU is left out where there is none, and says so.
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
    "client_turn",
    "demo",
    "rows",
    "plan",
    "privacy",
    "payload",
    "deployment",
    "engines",
    "import_time",
    "gpu",
)


def script(benchmark: str) -> Path:
    """Return the file that runs a benchmark."""
    folder = FOLDER / benchmark
    return folder / "run.py" if folder.is_dir() else FOLDER / f"{benchmark}.py"


def run_demo(folder: Path) -> None:
    """Run the demo into `folder`; its events are what ``demo.py`` reads."""
    program = Path(sys.executable).parent / "pilot-flwr"
    command = [str(program), "run", "experiment=demo", f"run.folder={folder}"]
    subprocess.run(command, check=True)  # nosec B603  # no shell, our own program


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all benchmarks; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        demo = Path(name) / "demo"
        for benchmark in BENCHMARKS:
            print(f"== {benchmark}", flush=True)
            if benchmark == "gpu" and not options.quick and not torch.cuda.is_available():
                print("left out: there is no GPU here", flush=True)
                continue
            extra = ["--quick"] if options.quick else []
            if benchmark == "demo" and not options.quick:
                run_demo(demo)
                extra = [str(demo)]
            command = [sys.executable, str(script(benchmark)), *extra]
            subprocess.run(command, check=True)  # nosec B603  # no shell, our own program


if __name__ == "__main__":
    main()
