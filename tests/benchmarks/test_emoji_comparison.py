"""The comparison on the emoji federations: its runs, its choice of rates, its statistics."""

import argparse
import importlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pilot_flwr.algorithm.connector import CrossTaskMoA
from pilot_flwr.metrics import METRICS

ROOT = Path(__file__).parents[2]
SCENARIOS = ("houses", "tasks", "untold", "both")


@pytest.fixture
def emoji(monkeypatch):
    """Import a module of ``benchmarks/emoji``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"emoji.{name}")


@pytest.fixture
def rates(emoji, monkeypatch):
    """A different rate of every method, in place of the searched ones."""
    made = {m: f"train.lr_scale={n + 1}" for n, m in enumerate(emoji("search").SEARCHED)}
    monkeypatch.setattr(emoji("search"), "read_rates", lambda: made)
    return made


def made_scores(seeds, *, seed=0, seed_spread=0.0, concept_spread=0.0, concepts=60):
    """Scores of methods a and b on two tasks of different size; b is zero, a is zero on average."""
    rng = np.random.default_rng(seed)
    of_concept = rng.normal(0, concept_spread, concepts)
    rows = {}
    for number in range(seeds):
        of_seed = rng.normal(0, seed_spread)
        for client, size in (("x-0", 40), ("x-1", 20), ("y-0", 10)):
            for concept in rng.permutation(concepts)[:size]:
                noise = rng.normal(0, 0.1)
                key = ("tasks", number, client, f"same/{concept}")
                rows[key] = of_seed + of_concept[concept] + noise
    table = pd.DataFrame({"a": rows, "b": dict.fromkeys(rows, 0.0)})
    table.index.names = ["scenario", "seed", "client", "row"]
    return table


def test_an_effect_is_the_mean_over_seeds_and_tasks_with_two_way_clusters(emoji):
    analysis = emoji("analysis")
    scores = analysis.select(made_scores(3, seed_spread=0.1, concept_spread=0.1), "tasks")
    cells = {}
    for (seed, client, row), a in scores["a"].items():
        cells.setdefault((seed, client[0]), []).append((row.split("/")[1], a))
    mean = np.mean([np.mean([a for _, a in cell]) for cell in cells.values()])
    sums = {"seed": {}, "concept": {}, "both": {}}
    for (seed, _), cell in cells.items():
        for concept, a in cell:
            part = (a - mean) / len(cell) / len(cells)
            for kind, key in (("seed", seed), ("concept", concept), ("both", (seed, concept))):
                sums[kind][key] = sums[kind].get(key, 0) + part
    one = {k: sum(v**2 for v in of.values()) * len(of) / (len(of) - 1) for k, of in sums.items()}
    largest = max(one["seed"], one["concept"], one["seed"] + one["concept"] - one["both"])
    freedom = largest**2 / (one["seed"] ** 2 / 2 + one["concept"] ** 2 / (len(sums["concept"]) - 1))
    found = analysis.effect(scores, "a", "b")
    assert found.difference.mean == pytest.approx(mean)
    error = found.difference.half_width / stats.t.ppf(0.975, freedom)
    assert error == pytest.approx(math.sqrt(largest), rel=0.02)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, freedom), rel=0.1)
    assert (found.seeds, found.rows) == (3, len(scores))


SPREADS = (
    {"seed_spread": 0.1},
    {"concept_spread": 0.3},
    {"seed_spread": 0.05, "concept_spread": 0.3},
    {"seed_spread": 0.1, "concept_spread": 0.3},
)


@pytest.mark.parametrize("spread", SPREADS[:3])
def test_the_intervals_cover_the_truth(emoji, spread):
    analysis = emoji("analysis")
    covered = 0
    for number in range(200):
        scores = analysis.select(made_scores(5, seed=number, **spread), "tasks")
        found = analysis.effect(scores, "a", "b").difference
        covered += abs(found.mean) <= found.half_width
    assert covered >= 181  # of 190 expected; 181 or more has probability .997


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
def test_five_seeds_rarely_show_an_effect_that_is_not_there(emoji, spread):
    """At the level of one test and at Holm's first step over 14 methods."""
    analysis = emoji("analysis")
    p = []
    for number in range(1000):
        scores = analysis.select(made_scores(5, seed=number, **spread), "tasks")
        p.append(analysis.effect(scores, "a", "b").p)
    assert sum(one < 0.05 for one in p) <= 70
    assert sum(one < 0.05 / 14 for one in p) <= 10


def test_equal_methods_have_no_effect_and_no_significance(emoji):
    analysis = emoji("analysis")
    scores = analysis.select(made_scores(3), "tasks").assign(c=0.0)
    found = analysis.effect(scores, "b", "c")
    assert (found.difference.mean, found.difference.half_width, found.p) == (0, 0, 1)


def test_a_single_seed_has_a_mean_but_no_interval(emoji):
    analysis = emoji("analysis")
    found = analysis.effect(analysis.select(made_scores(1), "tasks"), "a", "b")
    assert (found.difference.half_width, found.p, found.seeds) == (None, None, 1)


def test_methods_that_did_not_run_have_no_effect(emoji):
    analysis = emoji("analysis")
    scores = analysis.select(made_scores(2), "tasks").assign(c=np.nan)
    assert analysis.effect(scores, "a", "c") is None
    assert math.isnan(analysis.mean_score(scores, "c"))


def test_only_rows_that_both_methods_scored_are_compared(emoji):
    analysis = emoji("analysis")
    scores = analysis.select(made_scores(3, seed_spread=0.1), "tasks")
    gone = scores.index.get_level_values("seed") == 2
    partly = scores.assign(b=scores["b"].mask(gone))
    assert analysis.effect(partly, "a", "b") == analysis.effect(scores[~gone], "a", "b")


def compared_auto(emoji, *, auto, everyone):
    """Comparisons of `pilot_auto` on scores of three seeds with `pilot` at 0."""
    analysis = emoji("analysis")
    made = made_scores(3)
    named = {"pilot": made["b"], "pilot_all_neighbors": made["a"] + everyone, "pilot_auto": auto}
    scores = pd.concat(
        {
            scenario: pd.DataFrame(named, index=made.index).droplevel("scenario")
            for scenario in SCENARIOS
        },
        names=["scenario"],
    )
    return analysis.auto_comparisons(scores)


def test_pilot_auto_must_be_above_all_neighbors_and_not_inferior_to_both(emoji):
    better = compared_auto(emoji, auto=0.1, everyone=-0.3)
    assert better["houses"].p is None and better["tasks"].p < 0.05
    assert all(compared.non_inferior for compared in better.values())
    worse = compared_auto(emoji, auto=-0.1, everyone=-0.3)
    assert worse["tasks"].p < 0.05 and not worse["tasks"].non_inferior
    below = compared_auto(emoji, auto=0.1, everyone=0.3)
    assert below["tasks"].p > 0.9 and not below["tasks"].non_inferior


def test_p_values_are_corrected_within_a_question(emoji):
    analysis = emoji("analysis")
    made = made_scores(4, seed_spread=0.05)
    scenarios = {}
    for number, scenario in enumerate(("x", "y", "z")):
        moved = made.assign(pilot=made["a"] + 0.05 * number, local=0.0, other=0.0)
        scenarios[scenario] = moved.droplevel("scenario")
    scores = pd.concat(scenarios, names=["scenario"])
    questions = [analysis.Question("first", "local", ("x", "y", "z"))]
    questions.append(analysis.Question("second", "other", ("z",)))
    *first, second = analysis.findings(scores, questions)
    raw = [one.effect.p for one in first]
    assert [one.p for one in first] == pytest.approx(holm_by_hand(raw))
    assert second.p == second.effect.p == raw[2]


def holm_by_hand(values):
    adjusted, least = {}, 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, values[place] * (len(values) - rank)))
        adjusted[place] = least
    return [adjusted[place] for place in range(len(values))]


def test_every_method_runs_in_every_scenario_with_its_rate(emoji, rates):
    compare, search = emoji("compare"), emoji("search")
    files = {path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")}
    plain = {name for name in compare.ABLATIONS if " " not in name}
    assert {*search.METHODS, *plain} == files
    jobs = compare.jobs([0, 1])
    assert len(set(jobs)) == len(jobs)
    ran = {(job.scenario, job.seed, job.method) for job in jobs}
    one_task = {("houses", n, "fedavg_per_task") for n in (0, 1)}  # FedIT's run
    asked = {(s, n, m) for s in SCENARIOS for n in (0, 1) for m in search.METHODS}
    assert asked - ran == one_task
    of = {search.label_of(job): job.overrides for job in jobs}
    sent = [job.overrides for job in jobs if search.label_of(job) == "pilot model.sent_dtype=int4"]
    assert sent == 2 * [(rates["pilot"], "model.sent_dtype=int4")]
    assert of["zero_shot"] == () and of["fedit"] == (rates["fedit"],)
    assert of["pilot_m1"] == of["pilot_auto"] == of["pilot"] == (rates["pilot"],)
    assert of["pilot_stage1_only"] == (rates["pilot_stage1_only"],)


def test_every_question_can_be_answered(emoji, rates):
    analysis, search = emoji("analysis"), emoji("search")
    ran = {(job.scenario, search.label_of(job)) for job in emoji("compare").jobs([0])}
    questions = [(s, q) for q in analysis.QUESTIONS for s in q.scenarios]
    assert {(s, label) for s, q in questions for label in (q.method, q.baseline)} <= ran
    assert sum(len(question.scenarios) for question in analysis.QUESTIONS) == 37


def test_the_gate_needs_the_share_and_an_interval_above_its_limit(emoji):
    gate = emoji("gate")
    seeds = [{"x": {"score": 0.1, "rows": 30}}, {"x": {"score": 0.2, "rows": 20}}]
    found = gate.total(seeds, "x")
    low, high = stats.beta.ppf([0.025, 0.975], [7, 8], [44, 43])  # Clopper and Pearson, 7 of 50
    assert (found["share"], found["low"], found["high"]) == pytest.approx(
        (7 / 50, low, high), abs=1e-4
    )
    first, second = gate.GOALS
    for share, low, passes in ((0.4, 0.011, True), (0.39, 0.5, False), (0.9, 0.01, False)):
        pooled = {first: {"share": share, "low": 0.0}, second: {"share": 0.9, "low": low}}
        assert gate.passes(pooled) == passes


def test_the_best_rate_is_chosen_and_the_lower_of_equal_ones(emoji):
    search = emoji("search")
    assert search.chosen({"r=1": 0.2, "r=2": 0.4, "r=4": 0.4}) == "r=2"
    assert search.chosen({"r=1": -math.inf, "r=2": 0.1}) == "r=2"


def test_the_results_tables_have_every_run_and_row(emoji, tmp_path):
    compare, runs = emoji("compare"), emoji("runs")
    code = {"commit": "0" * 40, "changed": False, "versions": {"torch": "2"}}
    one = runs.JobResult(runs.Job("tasks", 0, "a", ("r=2",)), {"x-0": {"same/1": 0.25}}, 1.5, code)
    other = runs.JobResult(runs.Job("tasks", 0, "b", ("r=1", "x=1")), None, 2.0, code)
    elsewhere = runs.JobResult(runs.Job("both", 0, "a"), {"x-0": {"house/1": 1.0}}, 2.0, code)
    compare.write_results([one, other, elsewhere], tmp_path)
    scores = compare.read_scores(tmp_path / "scores.csv.gz")
    assert dict(scores.loc[("tasks", 0, "x-0", "same/1")]) == {"a": 0.25, "b x=1": 0}  # diverged
    assert math.isnan(scores.loc[("both", 0, "x-0", "house/1"), "b x=1"])  # did not run
    table = pd.read_csv(tmp_path / "runs.csv")
    assert list(table["method"]) == ["a", "b x=1", "a"]
    assert table["mean"].isna().tolist() == [False, True, False]
    first = (tmp_path / "scores.csv.gz").read_bytes()
    compare.write_results([one, other, elsewhere], tmp_path)
    assert (tmp_path / "scores.csv.gz").read_bytes() == first


def test_neighbours_are_counted_by_task_and_house(emoji):
    compare, runs = emoji("compare"), emoji("runs")
    first = {"name-0": ["name-1", "group-0"], "name-1": ["name-0", "name-2"], "group-0": []}
    second = {"name-0": ["name-1", "group-0"], "name-1": ["name-0"], "group-0": ["name-1"]}
    describe = {"describe-0": []}
    job, auto = (runs.Job("both", 1, method) for method in ("pilot", "pilot_auto"))
    chosen = {"neighbors": [first | describe, second | describe]}
    found = [
        runs.JobResult(job, {}, 1.0, {}, **chosen),
        runs.JobResult(auto, None, 1.0, {}, **chosen),  # diverged
        runs.JobResult(replace(job, overrides=("r=1", "x=1")), {}, 1.0, {}, **chosen),
        runs.JobResult(replace(job, method="fedit"), {}, 1.0, {}, **chosen),
    ]
    table = compare.neighbors_table(found)
    assert list(table)[4:] == ["neighbors", "name", "group", "describe", "same_house"]
    assert table.values.tolist() == [
        ["both", 1, "pilot", "name", 7 / 4, 5 / 4, 2 / 4, 0, 2 / 4],  # of 4 mixtures
        ["both", 1, "pilot", "group", 0.5, 0.5, 0, 0, 0],
        ["both", 1, "pilot", "describe", 0, 0, 0, 0, 0],
    ]
    pair = {"neighbors": [{"name-0": ["name-3"]}]}  # three houses in turn
    alike = runs.JobResult(runs.Job("houses", 0, "pilot"), {}, 1.0, {}, **pair)
    other = compare.neighbors_table([alike])
    assert other.values.tolist() == [["houses", 0, "pilot", "name", 1, 1, 0, 0, 1]]
    with pytest.raises(SystemExit, match="both,1,pilot has no neighbours"):
        compare.neighbors_table([runs.JobResult(job, {}, 1.0, {})])


def test_a_drawing_is_seen_if_another_tasks_client_of_the_house_trains_on_it(emoji, tmp_path):
    federation, rows, trained = emoji("federation"), [], {}
    federation.write_federation(
        tmp_path, "both", federation.SCENARIOS["both"], split="test", seed=3
    )
    for path in sorted((tmp_path / "both" / "3").glob("*.json")):
        task, number, split = path.stem.split("-")
        for row in json.loads(path.read_text(encoding="utf-8")):
            if split == "test":
                rows.append((3, f"{task}-{number}", row["id"], row["image"]))
            else:
                trained.setdefault(row["image"], set()).add(task)
    index = pd.MultiIndex.from_tuples([r[:3] for r in rows], names=["seed", "client", "row"])
    found = emoji("analysis").drawing_seen(pd.DataFrame({"a": 0.0}, index))
    expected = [bool(trained.get(i, set()) - {c.split("-")[0]}) for _, c, _, i in rows]
    assert found.tolist() == expected and 0 < sum(expected) < len(expected)


def test_effects_by_kind_are_those_of_the_kinds_rows(emoji):
    analysis = emoji("analysis")
    made = made_scores(2).rename(columns={"a": "pilot", "b": "local"})
    question = analysis.Question("x", "local", ("x",), "same")
    better = made.rename(lambda row: row.replace("same", "other_task"), level="row") + 1
    rows = pd.concat([made, better.assign(local=0.0)]).droplevel("scenario")
    scores = pd.concat({"x": rows}, names=["scenario"])
    (finding,) = analysis.findings(scores, [question])
    kinds = ("same", "other_house", "other_task")
    whole, same, none, other = (
        analysis.contrast(scores, question, "x", kind) for kind in ("", *kinds)
    )
    mean = finding.effect.difference.mean
    assert finding.effect == same and none is None
    assert other.difference.mean == pytest.approx(mean + 1)
    assert whole.difference.mean == pytest.approx(mean + 0.5)


def test_differences_in_each_seed_are_those_of_the_seeds_rows(emoji):
    made = made_scores(3)
    shifted = made.assign(b=made["a"] - 0.1 * made.index.get_level_values("seed"))
    found = emoji("tables")._in_each_seed(shifted, "a", "b")
    assert found == "+0.000, +0.100, +0.200"


def test_the_tables_of_mechanisms_are_means_over_seeds(emoji, monkeypatch):
    mechanisms, tables = emoji("mechanisms"), emoji("tables")
    jobs = [mechanisms.at_scale(m, 0, s) for s in mechanisms.SCALES for m in mechanisms.PARTS]
    search = emoji("search")
    jobs += [search.job_of("same_tasks", 0, m) for m in mechanisms.METHODS]
    labels = {mechanisms.label_with_rate(job) for job in jobs}
    made = made_scores(2).droplevel("scenario")["a"]
    scored = pd.DataFrame({label: made + n for n, label in enumerate(sorted(labels))})
    scores = pd.concat({"same_tasks": scored - 100, "tasks": scored}, names=["scenario"])
    results = {
        "swapped": [{"side": {"own": 0.1, "other": 0.2}}, {"side": {"own": 0.3, "other": 0}}],
        "forced": [{"router": {"own": 0.25}}, {"router": {"own": 0.5}}],
        "without": {"pilot": 2 * [{"all": {"train": 1.0, "test": 0.5}}]},
        "terms": {"tasks": [{"entropy": 1.0}, {"entropy": 0.5}], "same": 2 * [{"entropy": 0}]},
    }
    monkeypatch.setattr(tables, "note", lambda record: "measured")
    found = tables.mechanisms_tables({"results": results}, scores)
    cells = {name: cells_of(text) for name, text in found.items()}
    assert cells["emoji_swapped"] == [
        ["`fedavg_per_task` with", "side"],
        ["own", "0.200"],
        ["other", "0.100"],
    ]
    assert cells["emoji_forced"][1:] == [["router", "0.375"]]
    assert cells["emoji_without"][1:] == [["`pilot`", "all", "1.000", "0.500"]]
    assert cells["emoji_terms"][1:] == [["entropy", "0.750", "0.000"]]
    expected = {
        (job.scenario, f"`{search.label_of(job)}`", job.overrides[0].split("=")[1]): (
            emoji("analysis").mean_score(
                emoji("analysis").select(scores, job.scenario), mechanisms.label_with_rate(job)
            )
        )
        for job in jobs
    }
    head, *rows = cells["emoji_private"]
    columns = [(place, title[:-5]) for place, title in enumerate(head) if title.endswith(": all")]
    shown = {
        ("tasks", row[0], scale): float(row[place]) for row in rows for place, scale in columns
    }
    shown |= {("same_tasks", *row[:2]): float(row[2]) for row in cells["emoji_same_tasks"][1:]}
    assert shown == pytest.approx(expected, abs=1e-3)


def cells_of(text):
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_a_curves_default_point_is_a_run_of_the_comparison(emoji, rates):
    curves, compare = emoji("curves"), emoji("compare")
    compared = set(compare.jobs([0]))
    found = {point: curves.job(point) for point in curves.points()}
    assert curves.SINGLE in {job.scenario for job in found.values()}
    for point, job in found.items():
        middle = point.value == curves.DEFAULTS[point.curve]
        four = point.value == 4 and point.scenario == "tasks"  # one of Pilot's further settings
        assert (job in compared) == (middle or four)
    assert len(set(found.values()) - compared) == 2 * (4 * 4 + 2 * 5 + 3) - 1


def test_the_figures_need_no_complete_results(emoji, rates, tmp_path):
    analysis, search, curves, figure = map(emoji, ("analysis", "search", "curves", "figure"))
    made = made_scores(2)
    scores = pd.concat(
        {
            s: made.rename(columns={"a": "pilot", "b": "fedit"}).droplevel("scenario")
            for s in SCENARIOS
        },
        names=["scenario"],
    )
    figure.draw_methods(scores, tmp_path / "methods.svg")
    figure.draw_houses(tmp_path / "houses.png")
    figure.draw_curves(scores.assign(local=np.nan), tmp_path / "curves.svg")
    assert all(
        (tmp_path / name).stat().st_size > 1000
        for name in ("methods.svg", "curves.svg", "houses.png")
    )
    (point,) = [
        p for p in curves.points() if p[:3] == ("tasks", "concepts", 200) and p[3] == "pilot"
    ]
    first = scores[scores.index.get_level_values("seed") == 0]
    expected = analysis.mean_score(analysis.select(first, "tasks", "same"), "pilot")
    assert figure.mean_at(scores, point, "same") == expected
    few = scores[scores.index.get_level_values("row").isin([f"same/{n}" for n in range(29)])]
    assert math.isnan(figure.mean_at(few, point, "same"))
    assert math.isnan(figure.mean_at(scores, point, "other_task"))
    assert search.label_of(curves.job(point)) == "pilot"


def test_more_seeds_show_smaller_differences_until_concepts_limit_them(emoji):
    power = emoji("power")
    fit = emoji("analysis").Fit(0.0, 4e-5, 1e-5, 1e-6, seeds=4, concepts=100, rows=1000)
    few, many = (power.expected(fit, seeds=n, concepts=100) for n in (4, 400))
    error = (4e-5 + 1e-5 - 1e-6) ** 0.5
    freedom = (4.9e-5) ** 2 / (4e-5**2 / 3 + 1e-5**2 / 99)
    assert few.error() == pytest.approx((error, freedom))
    quantiles = stats.t.ppf([0.975, 0.8], freedom).sum()
    assert power.detectable(few, level=0.05) == pytest.approx(quantiles * error)
    # Of concepts, 1e-5 - 1e-6 is three quarters with 4 seeds.
    assert many.error()[0] == pytest.approx((4e-7 + 9e-6 / 0.75 * (1 - 1 / 400)) ** 0.5)
    # A quarter of the variance that rows of one concept share; that of single rows stays.
    more_concepts = power.expected(fit, seeds=4, concepts=400).error()[0]
    assert more_concepts == pytest.approx((4e-5 + (1e-5 - 1e-6) / 4) ** 0.5)


def test_the_real_bases_scores_are_by_task_and_kind(emoji):
    scores = {"x-0": {"same/1": 1.0, "other/1": 0.0}, "x-1": {"same/1": 0.5}, "y-0": {"same/2": 0}}
    runs = emoji("runs")
    found = runs.JobResult(runs.Job("both", 0, "pilot"), scores, 1.0, {})
    expected = {"x, other": 0.0, "x, same": 0.75, "y, same": 0.0}
    assert emoji("real_run").scores_of(found) == expected


@pytest.fixture
def tiny(emoji, monkeypatch, tmp_path):
    """A base of two steps, pictures, and the federation `name` of clients with 60 concepts."""
    exact = replace(METRICS["rouge_l"], approximate=lambda: "")  # here, not in the pool
    monkeypatch.setitem(METRICS, "rouge_l", exact)
    base, federation = emoji("base"), emoji("federation")
    from transformers import EfficientNetModel

    torch.manual_seed(0)
    tower = EfficientNetModel(base.tower_config())
    monkeypatch.setattr(base, "tower_state", lambda weights, own: tower.state_dict())
    base.make_small(tmp_path / "base", {}, seed=0, steps=2)
    federation.write_pictures(tmp_path / "pictures")

    def write(name, scenario):
        options = {"split": "validation", "seed": 0, "size": 60, "most": 6}
        federation.write_federation(tmp_path, name, scenario, **options)
        return argparse.Namespace(data=tmp_path, out=tmp_path / "runs", jobs=1)

    return write


SHORT = ("strategy.rounds=1", "evaluation.max_new_tokens=2")


def test_approximate_scores_are_refused(emoji, monkeypatch, tmp_path):
    approximate = replace(METRICS["rouge_l"], approximate=lambda: "there is no Java")
    monkeypatch.setitem(METRICS, "rouge_l", approximate)
    with pytest.raises(SystemExit, match="`describe` would be approximate: there is no Java"):
        emoji("runs").run_all([], argparse.Namespace(data=tmp_path, out=tmp_path))


@pytest.mark.slow
def test_runs_are_scored_by_row_and_resumed_and_a_diverged_one_has_no_scores(
    emoji, tiny, monkeypatch, tmp_path
):
    """Through the real command line."""
    federation, runs = emoji("federation"), emoji("runs")
    asked = tiny("both", federation.SCENARIOS["both"])
    good = runs.Job("both", 0, "fedit", SHORT)
    bad = runs.Job("both", 0, "fedit", (*SHORT, "train.lr_scale=1e20"))
    found, diverged = runs.run_all([good, bad], asked)
    expected = {}
    for path in (tmp_path / "both" / "0").glob("*-test.json"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        expected[path.stem.removesuffix("-test")] = {row["id"] for row in rows}
    assert {client: set(scores) for client, scores in found.scores.items()} == expected
    assert diverged.scores is None
    assert found.bytes_up > 0 and found.bytes_down > 0
    assert not [path for path in asked.out.glob("*/checkpoint")]
    monkeypatch.setattr(runs, "_run", None)  # another run would fail
    assert runs.run_all([good, bad], asked) == [found, diverged]


@pytest.mark.slow
def test_a_failing_run_ends_the_command_but_not_the_others(emoji, tiny, capsys):
    """Its leftovers do not hinder the next attempt."""
    federation, runs = emoji("federation"), emoji("runs")
    asked = tiny("both", federation.SCENARIOS["both"])
    good = runs.Job("both", 0, "zero_shot", SHORT)
    bad = runs.Job("both", 0, "zero_shot", (*SHORT, "train.epochs=0"))
    with pytest.raises(SystemExit, match=r"train\.epochs=0"):
        runs.run_all([bad, good], asked)
    assert "train.epochs=0 failed, but not by divergence" in capsys.readouterr().out
    (result,) = asked.out.glob("*.json")
    result.unlink()
    assert result.with_suffix(".jsonl").exists()
    assert runs.run_all([good], asked)[0].scores


@pytest.mark.slow
def test_swapped_and_removed_parts_leave_the_runs_scores_where_nothing_changes(
    emoji, tiny, monkeypatch
):
    federation, runs, mechanisms = emoji("federation"), emoji("runs"), emoji("mechanisms")
    from pilot_flwr.inference.runs import open_run

    asked = tiny("same_tasks", federation.SAME_TASKS)
    mean, pilot = (runs.Job("same_tasks", 0, m, SHORT) for m in ("fedavg_per_task", "pilot"))
    found, routed = runs.run_all([mean, pilot], asked, keep=True)
    assert [len(exchange) for exchange in routed.neighbors] == [9, 9]
    for exchange in routed.neighbors:
        assert all(len(set(o) - {client}) == len(o) == 2 for client, o in exchange.items())
    run, known = open_run(runs.folder_of(mean, asked)), trained_concepts(asked.data)
    swapped = mechanisms.swapped(run)
    parts = {f"{a} adapter, {b} LoRA" for a in ("own", "other") for b in ("own", "other")}
    others, both = "concepts of the other task", "concepts of both"
    assert set(swapped[both]) == set(swapped[others]) == parts
    scored = {}
    for own, other in itertools.permutations(known, 2):
        for concept, score in of_task(found, own):
            if concept in known[other] - known[own]:
                scored[own, other, concept] = score
    own = swapped[others]["own adapter, own LoRA"]
    assert scored and own == pytest.approx(np.mean(list(scored.values())), abs=1e-4)
    removed = mechanisms.without(run)
    assert set(removed) == {"as trained"}  # nothing is private
    means = [np.mean(list(of.values())) for of in found.scores.values()]
    assert removed["as trained"]["test"] == pytest.approx(np.mean(means), abs=1e-4)

    run = open_run(runs.folder_of(pilot, asked))
    forced = mechanisms.forced(run)
    scored = {"own task": [], "other task": []}
    for own, knows in itertools.product(known, repeat=2):
        for concept, score in of_task(routed, own):
            if concept in known[knows] and sum(concept in of for of in known.values()) == 1:
                scored["own task" if own == knows else "other task"].append(score)
    means = {side: pytest.approx(np.mean(scores), abs=1e-4) for side, scores in scored.items()}
    assert forced["router as trained"] == means
    fixed = torch.tensor([0.6, 0.3, 0.1])  # the own task's first, the others in alphabetical order
    with monkeypatch.context() as patch:
        patch.setattr(CrossTaskMoA, "route", routed_with(fixed))
        weights = mechanisms.forced(run)[mechanisms.ROUTED]
    others = [
        fixed[1 + sorted(set(known) - {own}).index(knows)]
        for own, knows in itertools.permutations(known, 2)
        for concept, _ in of_task(routed, own)
        if concept in known[knows] and sum(concept in of for of in known.values()) == 1
    ]
    assert weights == {
        "own task": pytest.approx(0.6, abs=1e-4),
        "other task": pytest.approx(np.mean(others), abs=1e-4),
    }
    removed = mechanisms.without(run)
    assert set(removed) == set(mechanisms.REMOVED)
    means = [np.mean(list(of.values())) for of in routed.scores.values()]
    assert removed["as trained"]["test"] == pytest.approx(np.mean(means), abs=1e-4)
    found = mechanisms.terms(run)
    share = "share of ψ_c in the connector's gradient"
    assert 0 < found["router's entropy"] <= 1 and 0 < found[share] < 1
    monkeypatch.setattr(CrossTaskMoA, "route", routed_with(torch.tensor([1.0, 0.0, 0.0])))
    assert mechanisms.terms(run)[share] == 0


def routed_with(probabilities):
    """A stand-in for the router: the same weights for every token."""
    trained = CrossTaskMoA.route

    def route(self, features, images=()):
        found = trained(self, features, images)
        return found._replace(probs=probabilities.expand_as(found.probs))

    return route


def trained_concepts(data):
    known = {}
    for path in sorted((data / "same_tasks" / "0").glob("*-train.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        concepts = {row["id"].split("/")[1] for row in rows}
        known.setdefault(path.name.split("-")[0], set()).update(concepts)
    return known


def of_task(found, task):
    for client, scores in found.scores.items():
        if client.rpartition("-")[0] == task:
            yield from ((row.split("/")[1], score) for row, score in scores.items())


@pytest.fixture
def mixture():
    """A trained-like stage 2 of three tasks, its projector's output, and features."""
    torch.manual_seed(0)
    adapters = {task: torch.nn.Linear(5, 4) for task in "abc"}
    crossed = {task: torch.nn.Linear(5, 4) for task in "bc"}
    router = torch.nn.Linear(5, 3, bias=False)
    connector = CrossTaskMoA(adapters, crossed, torch.nn.Linear(5, 4), router)
    features = torch.randn(2, 6, 5)
    return connector, torch.nn.Linear(5, 4)(features), features


@torch.no_grad()
def test_the_connectors_output_is_the_projectors_and_what_the_parts_add(emoji, mixture):
    connector, base, features = mixture
    parts, _ = emoji("mechanisms").added(connector, features, base)
    torch.testing.assert_close(base + sum(parts.values()), connector(features).features)


@torch.no_grad()
def test_a_forced_connector_is_the_mixture_with_all_weight_on_one_task(emoji, mixture, monkeypatch):
    connector, _, features = mixture
    made = emoji("mechanisms").forced_connectors(connector, "c")
    output = {name: one(features).features for name, one in made.items()}
    torch.testing.assert_close(output["router as trained"], connector(features).features)
    routed, crossed = connector.route(features), connector.cross_task_adapters["c"](features)
    for name, task in (("all on own task's ψ_t", 0), ("all on other task's ψ_t + ψ_c", 2)):
        weights = torch.zeros_like(routed.probs)
        weights[..., task] = 1
        monkeypatch.setattr(connector, "route", lambda *_, p=weights: routed._replace(probs=p))
        torch.testing.assert_close(output[name], connector(features).features)
    difference = output["all on other task's ψ_t + ψ_c"] - output["all on other task's ψ_t"]
    torch.testing.assert_close(difference, crossed)
