"""Benchmark indexing and reading a LLaVA JSON file of 665,000 rows: time and memory.

The file is synthetic: as many rows as ``llava_v1_5_mix665k.json`` and about as large, with
conversations of the same shape and random words.

Run ``python benchmarks/rows.py`` (about a minute, 1.2 GB of disk for a temporary file) to update
``benchmarks/results/rows.json``, or ``--quick`` for a smoke test.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _record import RESULTS, write_record

RESULT = RESULTS / "rows.json"
ROWS = 665_000

MEASURE = """
import json, random, resource, sys, time
from pathlib import Path
from pilot_flwr.data.json_rows import RowFile

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before, started = peak(), time.perf_counter()
rows = RowFile(Path(sys.argv[1]))
walked, walk_peak = time.perf_counter() - started, peak() - before
numbers = random.Random(0).choices(range(len(rows)), k=min(len(rows), 5000))
started = time.perf_counter()
for number in numbers:
    rows[number]
each = (time.perf_counter() - started) / len(numbers)
print(json.dumps({
    "rows": len(rows),
    "walk_seconds": round(walked, 2),
    "walk_extra_peak_mb": round(walk_peak / 1e6, 1),
    "random_row_microseconds": round(each * 1e6, 1),
    "extra_peak_mb": round((peak() - before) / 1e6, 1),
}))
"""


def make_file(path: Path, rows: int, *, lines: bool) -> None:
    """Write `rows` rows of about 1.6 kB each, as one array or as JSONL."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeionrstlm", k=draw.randint(2, 9))) for _ in range(5000)]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, most)))

    turns = [text(80) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            conversations = [
                {"from": speaker, "value": draw.choice(turns)}
                for _ in range(draw.randint(1, 5))
                for speaker in ("human", "gpt")
            ]
            row = {"id": number, "image": f"gqa/images/{number}.jpg"}
            begin = "" if lines else ",\n" if number else "["
            file.write(begin + json.dumps(row | {"conversations": conversations}))
            file.write("\n" if lines else "")
        file.write("" if lines else "]\n")


def measure(rows: int) -> dict[str, Any]:
    """Measure both formats, each in its own process."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("array", "lines"):
            path = Path(folder) / f"{kind}.json"
            make_file(path, rows, lines=kind == "lines")
            command = [sys.executable, "-c", MEASURE, str(path)]
            done = subprocess.run(  # nosec B603  # no shell, this package's program
                command, capture_output=True, text=True, check=True
            )
            size = {"file_mb": round(path.stat().st_size / 1e6, 1)}
            results[kind] = size | json.loads(done.stdout)
            path.unlink()
    return results


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 rows, write nothing")
    options = parser.parse_args(arguments)
    results = measure(1000 if options.quick else ROWS)
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(RESULT, results, packages=("pilot-flwr",))
    return results


if __name__ == "__main__":
    main()
