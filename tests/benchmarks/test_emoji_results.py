"""The committed results on the emoji federations: complete, and equal to the published ones."""

import csv
import gzip
import importlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "emoji"
SEEDS = (0, 1, 2, 3, 4)
TASKS_DIFFER = ("tasks", "untold", "both")
SCENARIOS = ("houses", *TASKS_DIFFER)


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("emoji.compare")


@pytest.fixture(scope="module")
def runs():
    with (RESULTS / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def task_means():
    """Method, scenario, seed and task → mean over the task's rows."""
    cells = defaultdict(list)
    with gzip.open(RESULTS / "scores.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            key = [row.pop(name) for name in ("scenario", "seed", "client", "row")]
            task = key[2].rpartition("-")[0]
            for method, score in row.items():
                if score:
                    cells[method, key[0], key[1], task].append(float(score))
    return {cell: fmean(scores) for cell, scores in cells.items()}


@pytest.fixture(scope="module")
def means(task_means):
    """Method, scenario and seed → mean over tasks of the mean over a task's rows."""
    tasks = defaultdict(list)
    for (*one, _), mean in task_means.items():
        tasks[tuple(one)].append(mean)
    return {one: fmean(of) for one, of in tasks.items()}


def test_the_chosen_rates_are_the_best_of_the_committed_search():
    rates = json.loads((ROOT / "benchmarks" / "emoji" / "rates.json").read_text())
    searched = json.loads((RESULTS / "search.json").read_text())["results"]["scores"]
    assert list(rates) == list(searched)
    for method, found in searched.items():
        scores = {rate: -1 if score is None else score for rate, score in found.items()}
        assert len(scores) == 4 and scores[rates[method]] == max(scores.values())


def test_every_run_is_there_once_at_its_rate_and_of_committed_code(compare, runs):
    search = importlib.import_module("emoji.search")
    asked = {
        (job.scenario, str(job.seed), search.label_of(job), "".join(job.overrides[:1]))
        for job in compare.jobs(SEEDS)
    }
    found = Counter((r["scenario"], r["seed"], r["method"], r["rate"]) for r in runs)
    assert found == Counter(asked)
    assert {row["changed"] for row in runs} == {"False"}
    assert all(len(row["commit"]) == 40 and "torch=" in row["versions"] for row in runs)
    inputs = {(row["scenario"], row["seed"], row["inputs"]) for row in runs}
    assert len(inputs) == 4 * len(SEEDS)
    assert all(len(one[-1]) == 8 for one in inputs)


def test_a_runs_mean_is_that_of_its_rows(runs, means):
    for row in runs:
        expected = means[row["method"], row["scenario"], row["seed"]]
        assert float(row["mean"] or 0) == pytest.approx(expected, abs=1e-4)


def published(page, name):
    """The cells of a page's table, by method and column."""
    text = (ROOT / page).read_text()
    table = text.partition(f"<!-- table: {name} -->")[2].partition("<!-- end -->")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    (_, *columns), _, *rows = ([cell.strip() for cell in line] for line in lines)
    return {method: dict(zip(columns, cells, strict=True)) for method, *cells in rows}


@pytest.mark.parametrize(
    ("page", "name"),
    [("docs/explanation/results.md", "emoji_methods"), ("README.md", "emoji_overview")],
)
def test_the_published_means_are_those_of_the_rows(means, compare, page, name):
    tables = importlib.import_module("emoji.tables")
    methods = tables.OVERVIEW if name == "emoji_overview" else tables.METHODS
    titles = tables.TITLES if name == "emoji_overview" else {s: f"`{s}`" for s in tables.TITLES}
    table = published(page, name)
    assert list(table) == list(methods)
    for method, cells in table.items():
        for scenario, title in titles.items():
            found = [
                means[method, scenario, str(seed)]
                for seed in SEEDS
                if (method, scenario, str(seed)) in means
            ]
            assert cells[title] == (f"{fmean(found):.3f}" if found else "")


def test_the_published_means_by_task_are_those_of_the_rows(task_means):
    for method, cells in published("docs/explanation/results.md", "emoji_by_task").items():
        assert len(cells) == 9
        for title, cell in cells.items():
            scenario, task = title.replace("`", "").split(": ")
            found = [task_means[method, scenario, str(seed), task] for seed in SEEDS]
            assert float(cell) == pytest.approx(fmean(found), abs=6e-4)


def test_the_methods_are_in_the_order_that_the_text_claims(means):
    """README.md, docs/explanation/results.md and docs/how-to/baselines.md."""

    def mean(method, scenario):
        return fmean(means[method, scenario, str(seed)] for seed in SEEDS)

    federated = [m for m, s, _ in means if s == "both" and not m.startswith("pilot_")]
    federated = [m for m in federated if m not in ("zero_shot", "local", "centralised")]
    one_model = {"fedit", "fedprox", "fedadam", "ffa_lora", "fedex_lora"}
    for scenario in SCENARIOS:
        assert mean("pilot", scenario) > mean("local", scenario)
        assert (mean("fedit", scenario) > mean("pilot", scenario)) == (scenario != "untold")
    for scenario in TASKS_DIFFER:
        assert mean("fedavg_per_task", scenario) > mean("pilot", scenario)
        assert mean("fedsa_lora", scenario) > mean("pilot", scenario)
    for method in ("ditto", "feddat"):
        for scenario in SCENARIOS:
            assert mean(method, scenario) < mean("pilot", scenario) + 0.01
    no_private = "pilot_no_cross_task_adapters model.client_adapter=false"
    for scenario in SCENARIOS:
        assert mean("pilot", scenario) < mean(no_private, scenario)
        assert (mean("fedit", scenario) > mean(no_private, scenario)) == (scenario != "untold")
    best = {s: sorted(set(federated), key=lambda m: -mean(m, s)) for s in ("untold", "both")}
    assert set(best["both"][:5]) == one_model
    assert best["untold"][:2] == ["fedavg_per_task", "fedsa_lora"]
    known = {m: mean(m, "houses") for m, s, _ in means if s == "houses" and m != "centralised"}
    assert max(known.values()) < mean("centralised", "houses") / 2


def test_scores_in_the_text_are_in_the_tables_of_the_section():
    """The introduction's are in any table."""
    page = (ROOT / "docs" / "explanation" / "results.md").read_text()
    introduction, *sections = re.split(r"^##+ ", page, flags=re.MULTILINE)
    checked = 0
    for text, source in ((introduction, page), *((section, section) for section in sections)):
        tables, prose = (
            " ".join(line for line in part.splitlines() if line.startswith("|") == tabulated)
            for part, tabulated in ((source, True), (text, False))
        )
        written = re.findall(r"(?<![\d.])\.\d{3}\b", prose)
        assert {f"0{number}" for number in written} <= set(re.findall(r"0\.\d{3}", tables))
        checked += len(written)
    assert checked > 20


def test_the_planned_tests_show_what_the_text_claims(compare):
    """README.md and docs/explanation/results.md."""
    analysis = importlib.import_module("emoji.analysis")
    found = analysis.findings(compare.read_scores(RESULTS / "scores.csv.gz"))
    shown = {(q.part, s): one.difference.mean > 0 for q, s, one, p in found if p < 0.05}
    assert shown == {
        **{("federation", s): True for s in SCENARIOS},
        **{("Pilot or one model", s): False for s in ("houses", "tasks", "both")},
        **{("Pilot or one model per task", s): False for s in TASKS_DIFFER},
        **{("adapters averaged per task", s): True for s in TASKS_DIFFER},
        **{(part, s): True for part in ("stage 2", "CT-MoA") for s in ("tasks", "untold")},
        **{("cross-task adapters", s): False for s in ("tasks", "untold")},
    }
