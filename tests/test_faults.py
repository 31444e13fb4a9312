"""Whole runs under Flower and Ray, killed and resumed: the benchmark, with three kills."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_and_resumed_is_bit_identical(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    faults = importlib.import_module("faults.run")
    found = faults.measure(tmp_path, kills=3, kills_a_run=3, seed=7)
    assert (found["kills"], found["identical"], found["runs"]) == (3, 1, 1)
    assert found["resumes"] >= 2  # one that is killed before it has a folder is started again
