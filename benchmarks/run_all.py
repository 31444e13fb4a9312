"""Run every benchmark, one after the other, each in a process of its own.

Run ``python benchmarks/run_all.py`` (about 15 minutes, 7 GiB) on a machine that does nothing else
to renew ``benchmarks/results``, or ``--quick`` to see that all of them work. To add a benchmark,
add its file to this folder and a row to `BENCHMARKS`, and its rows to ``tables.py``.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BENCHMARKS = ("connector", "aggregation", "client_turn", "demo", "rows")


def run_demo(folder: Path) -> None:
    """Run the demo into `folder`; its events are what ``demo.py`` reads."""
    program = Path(sys.executable).parent / "pilot-flwr"
    command = [str(program), "run", "experiment=demo", f"run.folder={folder}"]
    subprocess.run(command, check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all benchmarks; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        demo = Path(name) / "demo"
        for benchmark in BENCHMARKS:
            print(f"== {benchmark}", flush=True)
            extra = ["--quick"] if options.quick else []
            if benchmark == "demo" and not options.quick:
                run_demo(demo)
                extra = [str(demo)]
            script = str(FOLDER / f"{benchmark}.py")
            subprocess.run([sys.executable, script, *extra], check=True)


if __name__ == "__main__":
    main()
