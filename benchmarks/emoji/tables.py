"""Tables of the results on the emoji federations."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from _own_tables import note

from emoji.analysis import (
    ABLATIONS,
    ALL_SCENARIOS,
    COMPARATORS,
    MARGIN,
    NO_CT_MOA,
    NO_PRIVATE,
    PILOT,
    QUESTIONS,
    TASKS_DIFFER,
    VARIANTS,
    Effect,
    against_pilot,
    auto_comparisons,
    contrast,
    drawing_seen,
    effect,
    findings,
    mean_score,
    select,
)
from emoji.compare import read_scores
from emoji.curves import SINGLE, SINGLE_PARTS, SINGLE_SEEDS
from emoji.federation import SCENARIOS, task_of
from emoji.mechanisms import METHODS as COMPARED
from emoji.mechanisms import NAME, PARTS, SCALES, at_scale, label_with_rate
from emoji.search import CANDIDATES, METHODS, SCALE, chosen, job_of, label_of, searched
from pilot_flwr.run.tables import markdown
from pilot_flwr.sweeps.compare import interval_text, p_text

TITLES = {
    "houses": "only houses differ",
    "tasks": "only tasks differ",
    "untold": "tasks differ, same questions",
    "both": "both differ",
}
OVERVIEW = ("zero_shot", "local", "fedit", "fedavg_per_task", PILOT, "centralised")
"""Methods of the README's table and of `seen_table`."""
KINDS = {
    "houses": ("same", "other_house"),
    "tasks": ("same", "other_task"),
    "untold": ("same", "other_task"),
    "both": ("other_house", "other_task"),
}
SIGNIFICANT = 0.05


def emoji_tables(folder: Path) -> dict[str, str]:
    """Return the tables of all results in a folder, by name."""
    made = {}
    if (folder / "gate.json").exists():
        made["emoji_gate"] = gate_table(_record(folder / "gate.json"))
    if (folder / "search.json").exists():
        made["emoji_rates"] = rates_table(_record(folder / "search.json"))
    if (folder / "power.json").exists():
        made["emoji_power"] = power_table(_record(folder / "power.json"))
    if (folder / "real.json").exists():
        made["emoji_real"] = real_table(_record(folder / "real.json"))
    if (folder / "mechanisms.json").exists():
        found = read_scores(folder / "mechanisms.csv.gz")
        made |= mechanisms_tables(_record(folder / "mechanisms.json"), found)
    if (folder / "curves.csv.gz").exists():
        made["emoji_single"] = single_table(read_scores(folder / "curves.csv.gz"))
    if not (folder / "scores.csv.gz").exists():
        return made
    scores = read_scores(folder / "scores.csv.gz")
    source = source_of(pd.read_csv(folder / "runs.csv"), _record(folder / "compare.json"))
    methods = [method for method in METHODS if method in scores]
    made["emoji_methods"] = f"{methods_table(scores, methods)}\n{source}\n"
    made["emoji_kinds"] = kinds_table(scores, methods)
    made["emoji_by_task"] = by_task_table(scores, methods)
    made["emoji_seen"] = seen_table(scores)
    made["emoji_overview"] = overview_table(scores)
    if set(ABLATIONS) <= set(scores.columns):
        made["emoji_questions"] = questions_table(scores)
        made["emoji_by_kind"] = by_kind_table(scores)
        made["emoji_no_private"] = no_private_table(scores)
        made["emoji_auto"] = auto_table(scores)
        made["emoji_variants"] = variants_table(scores)
    return made


def gate_table(record: dict[str, Any]) -> str:
    """Return the gate's table: a row per task and kind, a column per method."""
    scores = record["results"]["scores"]
    (first, *_) = scores.values()
    seeds = list(first)
    rows = [["task, kind", f"examples ({' and '.join(f'seed {seed}' for seed in seeds)})", *scores]]
    for kind in first[seeds[0]]:
        counts = ", ".join(str(first[seed][kind]["rows"]) for seed in seeds)
        found = [
            ", ".join(f"{s[seed][kind]['score']:.3f}" for seed in seeds) for s in scores.values()
        ]
        rows.append([kind, counts, *found])
    return f"{markdown(rows)}\n{note(record)}\n"


def rates_table(record: dict[str, Any]) -> str:
    """Return the search's table: a row per method, with its candidates and the chosen one."""
    rows = [["method", "setting", "candidates: mean over tasks", "chosen"]]
    for method, found in record["results"]["scores"].items():
        setting = searched(method)
        values = {f"{setting}={value}": value for value in CANDIDATES[setting]}
        best = chosen({o: -math.inf if score is None else score for o, score in found.items()})
        shown = [
            f"{values[override]}: {'diverged' if score is None else format(score, '.3f')}"
            for override, score in found.items()
        ]
        edge = " (edge)" * (best in (list(values)[0], list(values)[-1]))
        rows.append([method, f"`{setting}`", ", ".join(shown), f"{values[best]}{edge}"])
    return f"{markdown(rows)}\n{note(record)}\n"


def power_table(record: dict[str, Any]) -> str:
    """Return the detectable differences: a row per contrast and number of seeds."""
    found = record["results"]["detectable"]
    rows = [["contrast", "examples", "seeds", "5 % level", "corrected"]]
    for name, of in found.items():
        contrast, kind, seeds = name.split(", ")
        levels = (f"{of[level]:.3f}" for level in ("single", "corrected"))
        rows.append([contrast, kind, seeds.removesuffix(" seeds"), *levels])
    return f"{markdown(rows)}\n{note(record)}\n"


def real_table(record: dict[str, Any]) -> str:
    """Return the scores on the base of SmolLM2 by task and kind of test row."""
    before, after = (record["results"][when] for when in ("before", "after"))
    rows = [["task, kind", "zero-shot", "Pilot"]]
    rows += [[cell, f"{before[cell]:.3f}", f"{after[cell]:.3f}"] for cell in before]
    return f"{markdown(rows)}\n{note(record)}\n"


def mechanisms_tables(record: dict[str, Any], scores: pd.DataFrame) -> dict[str, str]:
    """Return the tables of transfer between tasks and of private parts; means of seeds."""
    results = record["results"]
    same = [["method", f"`{SCALE}`", *(f"`{kind}`" for kind in KINDS["tasks"])]]
    for job in (job_of(NAME, 0, method) for method in COMPARED):
        cells = (_score(scores, NAME, label_with_rate(job), kind) for kind in KINDS["tasks"])
        same.append([f"`{label_of(job)}`", job.overrides[0].partition("=")[2], *cells])
    without = [["method", "model", "training examples", "test examples"]]
    for method, of in results["without"].items():
        without += [[f"`{method}`", *row] for row in _grid("", of)[1:]]
    tables = {
        "private": _private_rows(scores),
        "without": without,
        "same_tasks": same,
        "forced": _grid("concepts that only … trains on", results["forced"]),
        "swapped": _grid("`fedavg_per_task` with", _transposed(results["swapped"])),
        "terms": _grid("in stage 2", _transposed(_by_seed(results["terms"]))),
    }
    made = {f"emoji_{name}": f"{markdown(rows)}\n" for name, rows in tables.items()}
    return made | {"emoji_terms": f"{made['emoji_terms']}\n{note(record)}\n"}


def _private_rows(scores: pd.DataFrame) -> list[list[str]]:
    """Return the means of Pilot's variants at equal rates, over the seeds that `scores` has."""
    kinds = ("", *KINDS["tasks"])
    columns = [(scale, kind) for scale in SCALES for kind in kinds]
    rows = [
        ["method", *(f"{scale:g}: {f'`{kind}`' if kind else 'all'}" for scale, kind in columns)]
    ]
    for method in PARTS:
        labels = {scale: label_with_rate(at_scale(method, 0, scale)) for scale in SCALES}
        cells = (_score(scores, "tasks", labels[scale], kind) for scale, kind in columns)
        rows.append([f"`{method}`", *cells])
    return rows


def _grid(title: str, seeds: Sequence[dict[str, dict[str, float]]]) -> list[list[str]]:
    """Return rows of the means over seeds of values by row and column."""
    (first, *_) = seeds
    columns = list(next(iter(first.values())))
    rows = [[title, *columns]]
    for name in first:
        means = [statistics.fmean(of[name][column] for of in seeds) for column in columns]
        rows.append([name, *(f"{mean:.3f}" for mean in means)])
    return rows


def _by_seed(columns: dict[str, list[dict[str, float]]]) -> list[dict[str, dict[str, float]]]:
    return [dict(zip(columns, of, strict=True)) for of in zip(*columns.values(), strict=True)]


def _transposed(seeds: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, dict[str, float]]]:
    return [{row: {c: of[c][row] for c in of} for row in next(iter(of.values()))} for of in seeds]


def methods_table(scores: pd.DataFrame, methods: Sequence[str]) -> str:
    """Return a row per method: mean and effect against Pilot in every scenario."""
    effects = {s: against_pilot(scores, s, methods) for s in ALL_SCENARIOS}
    rows = [["method", *(cell for s in ALL_SCENARIOS for cell in (f"`{s}`", "method − `pilot`"))]]
    for method in methods:
        row = [method]
        for scenario in ALL_SCENARIOS:
            row.append(_score(scores, scenario, method))
            row.append(_difference(*effects[scenario].get(method, (None, None))))
        rows.append(row)
    seeds = sorted({found.seeds for of in effects.values() for found, _ in of.values()})
    counts = ", ".join(f"`{s}` {len(select(scores, s)):,}" for s in ALL_SCENARIOS)
    return (
        f"{markdown(rows)}\nMean over tasks and seeds, and its difference from Pilot with its "
        "95 % interval; bold: p < .05 after Holm's correction over the methods of a scenario. "
        f"Seeds: {', '.join(map(str, seeds))}; test examples of all seeds: {counts}.\n"
    )


def single_table(scores: pd.DataFrame) -> str:
    """Return a row per method with one client per task: mean and effect against Pilot."""
    scores = scores.loc[scores.index.get_level_values("seed").isin(SINGLE_SEEDS)]
    part = select(scores, SINGLE)
    rows = [["method", "mean", "method − `pilot`", "in each seed"]]
    tested = [method for method in METHODS if method != "pilot_auto"]
    effects: dict[str, tuple[Effect | None, float | None]] = {
        m: (effect(part, m, PILOT), None) for m in ("pilot_auto", *SINGLE_PARTS)
    }
    effects.update(against_pilot(scores, SINGLE, tested))
    for method in (*METHODS, *SINGLE_PARTS):
        text = _difference(*effects.get(method, (None, None)))
        seeds = _in_each_seed(part, method, PILOT) if text else ""
        rows.append([f"`{method}`", _score(scores, SINGLE, method), text, seeds])
    number = len(part[PILOT].dropna())
    return (
        f"{markdown(rows)}\nSeeds {', '.join(map(str, SINGLE_SEEDS))}, {number:,} test examples in "
        "all. Differences with their 95 % interval; bold: p < .05 after Holm's correction over the "
        "methods without `pilot_auto`, which equals `pilot` here, and without Pilot's variants.\n"
    )


def _in_each_seed(scores: pd.DataFrame, method: str, baseline: str) -> str:
    """Format the mean difference in every seed that both ran with."""
    seeds = scores[[method, baseline]].dropna().groupby(level="seed")
    found = (mean_score(rows, method) - mean_score(rows, baseline) for _, rows in seeds)
    return ", ".join(f"{difference:+.3f}" for difference in found)


def _difference(found: Effect | None, p: float | None = None) -> str:
    """Format an effect, in bold if `p` is significant; empty if there is none."""
    text = "" if found is None else interval_text(found.difference, sign="+")
    return f"**{text}**" if p is not None and p < SIGNIFICANT else text


def _score(scores: pd.DataFrame, scenario: str, method: str, kind: str = "") -> str:
    """Format a method's mean; empty if it did not run."""
    mean = mean_score(select(scores, scenario, kind), method)
    return "" if math.isnan(mean) else f"{mean:.3f}"


def kinds_table(scores: pd.DataFrame, methods: Sequence[str]) -> str:
    """Return a row per method: the mean by kind of row in every scenario."""
    columns = [(s, kind) for s in ALL_SCENARIOS for kind in KINDS[s]]
    rows = [["method", *(f"`{s}`: `{kind}`" for s, kind in columns)]]
    rows += [[m, *(_score(scores, s, m, kind) for s, kind in columns)] for m in methods]
    return f"{markdown(rows)}\n"


def by_task_table(scores: pd.DataFrame, methods: Sequence[str]) -> str:
    """Return a row per method: the mean by task in the scenarios with several tasks."""
    columns = [(s, task) for s in TASKS_DIFFER for task in SCENARIOS[s].tasks]
    rows = [["method", *(f"`{s}`: `{task}`" for s, task in columns)]]
    parts = []
    for scenario, task in columns:
        part = select(scores, scenario)
        parts.append(part[part.index.get_level_values("client").map(task_of) == task])
    rows += [[m, *(f"{mean_score(part, m):.3f}" for part in parts)] for m in methods]
    return f"{markdown(rows)}\n"


def overview_table(scores: pd.DataFrame) -> str:
    """Return the README's table: some methods' means."""
    rows = [["method", *(TITLES[s] for s in ALL_SCENARIOS)]]
    rows += [[method, *(_score(scores, s, method) for s in ALL_SCENARIOS)] for method in OVERVIEW]
    return f"{markdown(rows)}\n"


def questions_table(scores: pd.DataFrame) -> str:
    """Return a row per question and scenario."""
    head = ("question", "contrast", "scenario", "examples", "effect", "in each seed", "p",
            "p (Holm)")  # fmt: skip
    rows: list[Sequence[str]] = [head]
    for question, scenario, found, p in findings(scores):
        kind = f" `{question.kind}`" if question.kind else ""
        part = select(scores, scenario, question.kind)
        rows.append(
            [
                question.part,
                f"`{question.method}` − `{question.baseline}`",
                f"`{scenario}`",
                f"{found.rows:,}{kind}",
                _difference(found),
                _in_each_seed(part, question.method, question.baseline),
                p_text(found.p),
                p_text(p),
            ]
        )
    return f"{markdown(rows)}\n"


def by_kind_table(scores: pd.DataFrame) -> str:
    """Return the contrasts that are tested on one kind of row, on all rows and by kind.

    In all scenarios in which both methods ran.
    """
    kinds = ("same", "other_house", "other_task")
    rows = [["question", "scenario", "all", *(f"`{kind}`" for kind in kinds)]]
    for question in QUESTIONS:
        for scenario in ALL_SCENARIOS if question.kind else ():
            cells = [_difference(contrast(scores, question, scenario, k)) for k in ("", *kinds)]
            if any(cells):
                rows.append([question.part, f"`{scenario}`", *cells])
    return f"{markdown(rows)}\n"


def no_private_table(scores: pd.DataFrame) -> str:
    """Return Pilot without private adapters beside Pilot, two simple methods, and stage 1 alone."""
    others = (PILOT, "fedit", "fedavg_per_task", NO_CT_MOA)
    differences = (f"− `{other}`" for other in others)
    rows = [["scenario", "`pilot`", "without private adapters", *differences]]
    for scenario in ALL_SCENARIOS:
        part = select(scores, scenario)
        means = (_score(scores, scenario, method) for method in (PILOT, NO_PRIVATE))
        over = (_difference(effect(part, NO_PRIVATE, other)) for other in others)
        rows.append([f"`{scenario}`", *means, *over])
    return f"{markdown(rows)}\n"


def seen_table(scores: pd.DataFrame) -> str:
    """Return the means in `both` by whether other tasks' clients train on the tested drawing."""
    rows: list[list[str]] = [["method"], *([method] for method in OVERVIEW)]
    for kind in KINDS["both"]:
        part = select(scores, "both", kind)
        seen = drawing_seen(part)
        for title, mask in (("seen", seen), ("not seen", ~seen)):
            chosen = part[mask]
            rows[0].append(f"`{kind}`, {title} ({len(chosen):,})")
            for row in rows[1:]:
                row.append(f"{mean_score(chosen, row[0]):.3f}")
    return f"{markdown(rows)}\n"


def variants_table(scores: pd.DataFrame) -> str:
    """Return Pilot's further settings in `tasks`."""
    part = select(scores, "tasks")
    rows = [["setting", "mean", "setting − `pilot`"]]
    rows.append([f"`{PILOT}`", _score(scores, "tasks", PILOT), ""])
    for variant in VARIANTS:
        if (found := effect(part, variant, PILOT)) is not None:
            rows.append([f"`{variant}`", _score(scores, "tasks", variant), _difference(found)])
    return f"{markdown(rows)}\n"


def auto_table(scores: pd.DataFrame) -> str:
    """Return `pilot_auto` beside the two methods with which it is compared."""
    methods = (*COMPARATORS, "pilot_auto")
    differences = (f"`pilot_auto` − `{other}`" for other in COMPARATORS)
    rows = [["scenario", *(f"`{m}`" for m in methods), *differences,
             "p above `pilot_all_neighbors`", f"non-inferior by {MARGIN:g}"]]  # fmt: skip
    for scenario, compared in auto_comparisons(scores).items():
        over = [_difference(compared.over[other]) for other in COMPARATORS]
        means = [_score(scores, scenario, method) for method in methods]
        decided = "yes" if compared.non_inferior else "not shown"
        rows.append([f"`{scenario}`", *means, *over, p_text(compared.p), decided])
    return f"{markdown(rows)}\n"


def source_of(runs: pd.DataFrame, record: dict[str, Any]) -> str:
    """Return number, time, code and machine of the runs."""
    changed = runs["changed"].astype(bool).map({True: "+", False: ""})
    commits = ", ".join(sorted(set(runs["commit"].str[:12] + changed)))
    machine = record["machine"]
    return (
        f"`runs.csv`: {len(runs)} runs, {runs['seconds'].sum() / 3600:.1f} h in total; commit "
        f"{commits}; {'; '.join(sorted(set(runs['versions'])))}; "
        f"{record['results']['in_parallel']} in parallel on {machine['cores']} cores of "
        f"{machine['cpu']}"
    )


def _record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
