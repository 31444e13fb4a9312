"""The comparison on the scenarios: what is run, how rates are chosen, and the committed results."""

import csv
import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
from scipy import stats

from pilot_flwr.sweeps.jobs import SweepFolder, expand_jobs
from pilot_flwr.sweeps.runner import check_jobs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scenarios"
SCENARIOS = ("scenario1", "scenario2")


@pytest.fixture
def scenarios(monkeypatch):
    """Import a module of ``benchmarks/scenarios``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"scenarios.{name}")


@pytest.fixture
def commands(scenarios, monkeypatch):
    """The sweeps that are asked for, as overrides, in place of running them."""
    asked = []
    for name in ("search", "compare"):
        monkeypatch.setattr(
            scenarios(name), "sweep", lambda *words, **_: asked.append(tuple(map(str, words)))
        )
    return asked


NOT_YET_COMPARED = {"pilot_auto", "feddpa", "feddat"}
"""Methods that have no committed results."""


def rows_of(name):
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_method_and_ablation_is_compared(scenarios):
    sweeps = scenarios("sweeps")
    files = {path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")}
    assert {*sweeps.METHODS, *sweeps.ABLATIONS} == files - NOT_YET_COMPARED
    ablations = {name for name in files if name.startswith("pilot_")} - NOT_YET_COMPARED
    assert ablations == set(sweeps.ABLATIONS)


def test_the_lower_of_equal_rates_is_chosen(scenarios):
    search = scenarios("search")
    tied = {"r=4": {100: 0.5}, "r=1": {100: 0.5, 101: 0.4}, "r=2": {100: 0.5, 101: 0.4}}
    assert search.ranking(tied) == ["r=1", "r=2", "r=4"]
    assert search.chosen(tied) == "r=1"


def test_the_second_seed_decides_between_the_best_two_only(scenarios):
    search = scenarios("search")
    found = {
        "r=1": {100: 0.6, 101: 0.2},
        "r=2": {100: 0.5, 101: 0.5},
        "r=4": {100: 0.4, 101: 0.9},  # of another search in the same folder
    }
    assert search.chosen(found) == "r=2"


def test_a_rate_that_diverges_comes_last(scenarios, tmp_path):
    columns = "name,method,variant,seed,status,mean,zero_shot_mean"
    lines = [
        "s,fedit,r=1,100,done,0.1,0.1",
        "s,fedit,r=2,100,failed,0.9,0.1",  # one client diverged, the others went on
        "s,fedit,r=4,100,failed,,",
        ",,r=8,,not finished,,",  # where a stopped search goes on
    ]
    (tmp_path / "results.csv").write_text("\n".join([columns, *lines]) + "\n")
    search = scenarios("search")
    assert search.ranking(search.read_scores(tmp_path)["fedit"]) == ["r=1", "r=2", "r=4"]


def test_every_method_is_searched_with_the_same_budget(scenarios, commands, monkeypatch):
    search = scenarios("search")
    of_method = {
        method: {
            f"{search.searched(method)}={value}": {100: 1 / value}
            for value in search.CANDIDATES[search.searched(method)]
        }
        for method in search.trained_methods()
    }
    monkeypatch.setattr(search, "read_scores", lambda _: of_method)
    search.search("scenario1", Path("x"), jobs=1)
    trials = Counter()
    for _, _, split, strategies, values, seed in commands:
        assert split == "data.evaluate_on=validation"
        for method in inside(strategies):
            trials[method, seed] += len(inside(values))
    methods = {method for method, _ in trials}
    assert methods == set(search.trained_methods()) and "zero_shot" not in methods
    assert {trials[method, "seed=choice(100)"] for method in methods} == {5}
    assert {trials[method, "seed=choice(101)"] for method in methods} == {2}


def inside(word):
    return word.partition("=choice(")[2].removesuffix(")").split(",")


def test_ablations_are_compared_at_pilots_rate(scenarios, commands, monkeypatch):
    compare = scenarios("compare")
    rates = {"scenario1": {"pilot": "train.lr_scale=0.5", "fedit": "train.lr_scale=2"}}
    monkeypatch.setattr(compare, "read_rates", lambda: rates)
    methods = ("zero_shot", "fedit", "pilot", "pilot_m1")
    compare.compare("scenario1", Path("x"), methods, jobs=1, seeds=(0, 1))
    assert [words[2:] for words in commands] == [
        ("strategy=choice(zero_shot)", "seed=choice(0,1)"),
        ("strategy=choice(fedit)", "train.lr_scale=2", "seed=choice(0,1)"),
        ("strategy=choice(pilot,pilot_m1)", "train.lr_scale=0.5", "seed=choice(0,1)"),
    ]


def test_no_comparison_sets_what_its_methods_ignore(scenarios, commands, tmp_path):
    compare, sweeps = scenarios("compare"), scenarios("sweeps")
    methods = (*sweeps.METHODS, *sweeps.ABLATIONS)
    compare.compare("scenario1", tmp_path, methods, jobs=1, seeds=[0])
    compare.main(["--quick"])
    jobs = [expand_jobs([f"experiment={name}", *words]) for _, name, *words in commands]
    assert sum(map(len, jobs)) == len(methods) + 2
    for sweep in jobs:
        check_jobs(SweepFolder(tmp_path / "new"), sweep)


def test_a_sweep_with_a_failed_job_stops_the_comparison(scenarios, monkeypatch, tmp_path):
    sweeps = scenarios("sweeps")
    program = tmp_path / "pilot-flwr"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sweeps.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(sweeps.subprocess.CalledProcessError):
        sweeps.sweep(tmp_path / "s", "scenario1", jobs=1)
    sweeps.sweep(tmp_path / "s", "scenario1", jobs=1, may_fail=True)
    program.write_text("#!/bin/sh\nexit 130\n")
    with pytest.raises(sweeps.subprocess.CalledProcessError):
        sweeps.sweep(tmp_path / "s", "scenario1", jobs=1, may_fail=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_rates_are_those_that_the_committed_search_found(scenario):
    rates = json.loads((ROOT / "benchmarks" / "scenarios" / "rates.json").read_text())
    found = {}
    for row in rows_of(f"search-{scenario}"):
        assert row["evaluated_on"] == "validation" and row["seed"] in ("100", "101")
        assert row["name"] == scenario and row["changed"] == "false" and row["commit"]
        score = float(row["mean"]) if row["status"] == "done" else -1.0
        found.setdefault(row["method"], {}).setdefault(row["variant"], []).append(score)
    assert {method: len(candidates) for method, candidates in found.items()} == dict.fromkeys(
        rates[scenario], 5
    )
    for method, candidates in found.items():
        twice = {variant: sum(scores) for variant, scores in candidates.items() if scores[1:]}
        assert len(twice) == 2
        assert twice[rates[scenario][method]] == max(twice.values())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_committed_results_are_whole_and_of_the_committed_rates(scenario, scenarios):
    sweeps = scenarios("sweeps")
    rates = sweeps.read_rates()[scenario]
    rows = rows_of(scenario)
    methods = (*sweeps.METHODS, *sweeps.ABLATIONS)
    assert Counter((row["method"], int(row["seed"])) for row in rows) == Counter(
        (method, seed) for method in methods for seed in range(5)
    )
    for row in rows:
        assert (row["status"], row["evaluated_on"], row["failures"]) == ("done", "test", "0")
        assert (
            row["changed"] == "false" and len(row["commit"]) == 40 and "torch=" in row["versions"]
        )
        rate = rates.get(row["method"], rates["pilot"] if "pilot_" in row["method"] else "")
        assert rate in row["overrides"].split() or not rate
        assert "lr_scale" not in row["overrides"].replace(rate or "?", "")
    for method in methods:
        assert len({row["settings"] for row in rows if row["method"] == method}) == 1


def published_table(name, page="docs/explanation/results.md"):
    text = (ROOT / page).read_text()
    table = text.partition(f"<!-- table: {name} -->")[2].partition("<!-- end -->")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def means_by_seed(rows):
    found = {}
    for row in rows:
        tasks = [float(v) for key, v in row.items() if key.startswith("score.") and v]
        found.setdefault(row["method"], {})[row["seed"]] = sum(tasks) / 3
    return {method: [of[seed] for seed in "01234"] for method, of in found.items()}


def against_pilot(scores, methods):
    """Difference to Pilot and p of each method, by scipy and Holm's method step by step."""
    p = {m: float(stats.ttest_rel(scores[m], scores["pilot"]).pvalue) for m in methods}
    found, largest = {}, 0.0
    for rank, method in enumerate(sorted(methods, key=p.__getitem__)):
        largest = max(largest, min(1.0, p[method] * (len(methods) - rank)))
        differences = [a - b for a, b in zip(scores[method], scores["pilot"], strict=True)]
        shown = "< 0.001" if largest < 0.001 else f"{largest:.3f}"
        found[method] = (interval_of(differences, "+"), shown)
    return found


def interval_of(values, sign=""):
    mean = sum(values) / 5
    _, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    return f"{mean:{sign}.3f} ± {high - mean:.3f}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_published_figures_are_those_of_the_rows(scenario, scenarios):
    methods = scenarios("sweeps").METHODS
    scores = means_by_seed(rows_of(scenario))
    table = {row["method"]: row for row in published_table(scenario)}
    assert list(table) == list(methods)
    for method in methods:
        assert table[method]["mean"] == interval_of(scores[method])
    for method, expected in against_pilot(scores, [m for m in methods if m != "pilot"]).items():
        assert (table[method]["difference to pilot"], table[method]["p"]) == expected, method


def test_the_readmes_overview_is_that_of_the_rows():
    overview = published_table("overview", "README.md")
    for scenario, column in zip(SCENARIOS, list(overview[0])[1:], strict=True):
        scores = means_by_seed(rows_of(scenario))
        for row in overview:
            assert row[column] == interval_of(scores[row["method"]])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_ablations_figures_are_those_of_the_rows(scenario, scenarios):
    scores = means_by_seed(rows_of(scenario))
    table = {row["method"]: row for row in published_table("ablations")}
    ablations = scenarios("sweeps").ABLATIONS
    assert list(table) == ["pilot", *ablations]
    for method, row in table.items():
        assert row[f"{scenario}: mean"] == interval_of(scores[method])
    for method, expected in against_pilot(scores, ablations).items():
        assert tuple(table[method][f"{scenario}: {key}"] for key in ("difference", "p")) == expected


@pytest.mark.slow
def test_the_comparison_runs_in_its_quick_size(scenarios, capfd):
    scenarios("compare").main(["--quick"])
    assert "| pilot " in capfd.readouterr().out
