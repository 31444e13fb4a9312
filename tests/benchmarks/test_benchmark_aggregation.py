"""The aggregation benchmark runs, and meets the goals that do not depend on the machine's load."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quick_run_writes_a_full_record(tmp_path: Path) -> None:
    output = tmp_path / "new" / "aggregation.json"
    script = ["benchmarks/aggregation.py", "--quick", "--output", str(output)]
    subprocess.run([sys.executable, *script], cwd=ROOT, check=True, capture_output=True)
    text = output.read_text()
    record = json.loads(text)
    assert set(record) == {"command", "date", "commit", "machine", "versions", "results"}
    assert record["command"] == (
        "python benchmarks/aggregation.py --quick --output aggregation.json"
    )
    assert record["versions"]["python"] == platform.python_version()
    assert str(tmp_path) not in text and str(ROOT) not in text
    results = record["results"]
    assert results["accuracy"]["distances_max_relative_error"] < 1e-6
    assert results["accuracy"]["float32_gram_expansion_max_relative_error"] > 1e-6
    assert results["accuracy"]["mix_max_error_half_ulps"] <= 1.001
    assert [point["clients"] for point in results["costs"]] == [2, 4]
    assert results["main"]["wall"]["ratio"]["to_flower"] > 0
    assert results["many"]["wall"]["ratio"]["to_product"] > 0
