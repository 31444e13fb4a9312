"""Every benchmark's quick size, and what the benchmarks compute besides times.

The aggregation's is in test_benchmark_aggregation.py.
"""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
ROBUSTNESS = {"fuzz", "faults", "site_faults"}
"""Results of tests/robustness; their tables are the benchmarks'."""


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of the folder by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_deployment_splits_an_exchange(benchmark):
    """A made-up run: 25 s, of which clients work for 9, side by side; the parts are the 25."""
    found = benchmark("deployment.run").main(["--quick"])["example"]
    last = found["exchanges"][-1]
    assert last["wall_seconds"] == sum(last["parts_seconds"].values()) == 25
    assert found["without_work_seconds"] == 25 - 9
    parts = last["parts_seconds"]
    assert (parts["work"], parts["poll"], parts["python"], parts["app"]) == (9, 0.5, 1.5, 3)


def result_files() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (FOLDER / "results").glob("*.json")}


@pytest.mark.parametrize(
    "name",
    [
        *("connector", "client_session", "demo", "rows", "plan", "privacy"),
        pytest.param("object_stores", marks=pytest.mark.slow),  # starts two processes
        pytest.param("training_step", marks=pytest.mark.slow),  # starts three
    ],
)
def test_quick_size_runs_and_writes_nothing(name, benchmark, capsys):
    before = result_files()
    benchmark(name).main(["--quick"])
    assert capsys.readouterr().out
    assert result_files() == before


def test_an_object_store_is_filled_with_replies(benchmark):
    found = benchmark("object_stores").fill(FLWR_IN_MEMORY_DB_NAME, replies=2, parameters=64_000)
    assert "InMemory" in found["store"] and found["replies"] == 2
    assert 2 * 64_000 * 2 < found["bytes"] < 3 * 64_000 * 2  # bfloat16, and its headers


def test_run_all_runs_every_script_there_is(benchmark):
    scripts = {path.stem for path in FOLDER.glob("[!_]*.py")} - {"run_all", "tables", "random_base"}
    scripts |= {path.parent.name for path in FOLDER.glob("*/run.py")}
    assert set(benchmark("run_all").BENCHMARKS) == scripts
    assert all(benchmark("run_all").script(name).is_file() for name in scripts)
    assert set(benchmark("tables").ROWS) == scripts | ROBUSTNESS


def test_tables_prints_every_result_file_there_is(benchmark, tmp_path):
    tables = benchmark("tables")
    found = tables.table()
    for script in ("fuzz/run.py", "faults/run.py", "faults/sites.py"):
        assert script in found
    names = {name.removesuffix(".json") for name in result_files()} - ROBUSTNESS
    for name in names - {"gpu_tiny_cpu"}:  # ratios that say nothing of a GPU
        script = benchmark("run_all").script(name)
        assert f"`python {script.relative_to(FOLDER.parent).as_posix()}" in found
    assert len(tables.table(tmp_path).split("\n|")) == 2  # nothing measured: header and rule


def test_the_bare_products_are_those_of_a_training_pass(benchmark):
    """Both do the same floating point operations in matrix products, by torch's own count."""
    connector = benchmark("connector")
    case = connector.Case(connector.TINY, torch.device("cpu"))

    def operations(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    whole = operations(connector.training_pass(case.stage2(), case))
    bare = operations(case.products(trained=3, frozen=3, experts=3))
    assert whole == pytest.approx(bare, rel=1e-4)  # L_b has a product of T numbers
    whole = operations(connector.stage1_pass(case.stage1(), case, loss=False))
    assert whole == operations(case.products(trained=2, frozen=0, experts=0))


def test_peak_memory_of_the_literal_formula_holds_its_matrix(benchmark):
    connector = benchmark("connector")
    task = torch.zeros(1, 8, 16)
    run = connector.loss_pass(task, task, connector.literal_official)
    assert connector.peak_bytes(run, torch.device("cpu")) > 4 * (8 * 16) ** 2


def test_union_of_intervals_counts_no_second_twice(benchmark):
    intervals = [(3, 5), (0, 2), (1, 2), (4, 9), (4, 6), (12, 13)]
    covered = {second for first, last in intervals for second in range(first, last)}
    assert benchmark("demo").union_seconds(intervals) == len(covered)


def test_idle_share_of_a_made_up_run(benchmark):
    """Both exchanges last 10 s, of which clients are busy for 8: in turn, then side by side."""
    found = benchmark("demo").main(["--quick"])
    (later,) = found["later_exchanges"]
    assert found["first_exchange"]["idle_share"] == later["idle_share"] == pytest.approx(0.2)
    assert (found["first_exchange"]["mean_busy_workers"], later["mean_busy_workers"]) == (0.8, 1.6)


def test_an_unfinished_run_is_refused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="no completed run"):
        benchmark("demo").main([str(tmp_path)])


def test_ratios_are_taken_within_each_turn(benchmark):
    """1/2, 4/4 and 9/3: their median is 1, while that of the seconds, 4/3, is not."""
    times = {"wall": {"a": [1.0, 4.0, 9.0], "b": [2.0, 4.0, 3.0]}}
    found = benchmark("_timing").summarize(times, {"a_to_b": ("a", "b")})["wall"]
    assert found["ratio"]["a_to_b"] == 1
    assert found["ratio_range"]["a_to_b"] == [0.5, 3]
    assert math.isclose(found["median_seconds"]["a"], 4)


def test_the_pages_tables_are_those_of_the_result_files(benchmark):
    tables = benchmark("tables")
    made = tables.all_tables()
    for page, names in tables.PAGES.items():
        text = (FOLDER.parent / page).read_text()
        assert re.findall(r"<!-- table: (\w+) -->\n(?!<!-- end)", text) == list(names), page
        assert tables.updated(text, made) == text, page
    marked = {
        path.relative_to(FOLDER.parent).as_posix()
        for path in [FOLDER.parent / "README.md", *(FOLDER.parent / "docs").rglob("*.md")]
        if "<!-- table: " in path.read_text()
    }
    assert marked == set(tables.PAGES)
