"""Count the passed tests of every family of base models, by subject.

Run ``python benchmarks/families.py`` (minutes) to update ``benchmarks/results/families.json``, from
which ``tables.py`` makes a table of the documentation, or ``--quick`` for the labels of one family.
The tests are those with ``@pytest.mark.family``; `tests/families/outcomes.py` counts them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _record import RESULTS, ROOT, write_record

RESULT = RESULTS / "families.json"


def outcomes(*options: str) -> dict[str, Any]:
    """Run the tests; return check → family → numbers of tests that ran and that passed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "families.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "family", "--families", str(file)]
        # A failure is a result: the table shows it.
        subprocess.run([*command, *options], cwd=ROOT, check=False)  # nosec B603  # own program
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the result file, or print the outcome of one family's labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one family's labels, write nothing")
    if parser.parse_args(arguments).quick:
        print(json.dumps(outcomes("tests/data/test_templates.py", "-k", "smolvlm"), indent=2))
        return
    results = {"tests": outcomes("tests")}
    write_record(RESULT, results, packages=("pilot-flwr", "torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
