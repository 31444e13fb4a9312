"""Tables of the results on the emoji federations."""

import json
import math
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from _own_tables import note

from emoji.analysis import (
    ABLATIONS,
    EVERYWHERE,
    MARGIN,
    PILOT,
    RIVALS,
    VARIANTS,
    against_pilot,
    answers,
    effect,
    mean_score,
    select,
    verdicts,
)
from emoji.compare import CHOOSING, NEIGHBORS, read_scores
from emoji.search import CANDIDATES, METHODS, chosen, searched
from pilot_flwr.formatting import count
from pilot_flwr.run.tables import markdown
from pilot_flwr.sweeps.compare import interval_text, p_text

TITLES = {
    "houses": "only houses differ",
    "tasks": "only tasks differ",
    "untold": "tasks differ, same questions",
    "both": "both differ",
}
OVERVIEW = ("zero_shot", "local", "fedit", "fedavg_per_task", PILOT, "centralised")
"""Methods of the README's table."""
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
    if (folder / "why.json").exists():
        record, scores = _record(folder / "why.json"), read_scores(folder / "why.csv.gz")
        made["emoji_why"] = why_table(record, scores)
    if not (folder / "scores.csv.gz").exists():
        return made
    scores = read_scores(folder / "scores.csv.gz")
    source = source_of(pd.read_csv(folder / "runs.csv"), _record(folder / "compare.json"))
    methods = [method for method in METHODS if method in scores]
    made["emoji_methods"] = f"{methods_table(scores, methods)}\n{source}\n"
    made["emoji_kinds"] = f"{kinds_table(scores, methods)}\n{source}\n"
    made["emoji_overview"] = overview_table(scores)
    if set(ABLATIONS) <= set(scores.columns):
        made["emoji_questions"] = f"{questions_table(scores)}\n{source}\n"
        made["emoji_auto"] = auto_table(scores)
        made["emoji_neighbors"] = neighbors_table(pd.read_csv(folder / "neighbors.csv"))
        made["emoji_variants"] = variants_table(scores)
    return made


def gate_table(record: dict[str, Any]) -> str:
    """Return the gate's table: a row per task and kind, a column per method."""
    scores = record["results"]["scores"]
    (first, *_) = scores.values()
    seeds = list(first)
    rows = [["task, kind", f"rows ({' and '.join(f'seed {seed}' for seed in seeds)})", *scores]]
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
    rows = [["contrast", "rows", "seeds", "5 % level", "corrected"]]
    for name, of in found.items():
        contrast, kind, seeds = name.split(", ")
        levels = (f"{of[level]:.3f}" for level in ("single", "corrected"))
        rows.append([contrast, kind, seeds.removesuffix(" seeds"), *levels])
    return f"{markdown(rows)}\n{note(record)}\n"


def real_table(record: dict[str, Any]) -> str:
    """Return the scores on the real base by task and kind of test row."""
    before, after = (record["results"][when] for when in ("before", "after"))
    rows = [["task, kind", "untrained", "after Pilot"]]
    rows += [[cell, f"{before[cell]:.3f}", f"{after[cell]:.3f}"] for cell in before]
    return f"{markdown(rows)}\n{note(record)}\n"


def why_table(record: dict[str, Any], scores: pd.DataFrame) -> str:
    """Return the tables of transfer between tasks; exchanged parts and terms are means of seeds."""
    results = record["results"]
    rows = [["three equal tasks: method", "mean on `other_task`"]]
    rows += [[f"`{m}`", _score(scores, "same_tasks", m, "other_task")] for m in scores]
    sides = list(results["swapped"][0])
    parts = [["`fedavg_per_task` with", *(f"concepts of {side}" for side in sides)]]
    for part in results["swapped"][0][sides[0]]:
        means = [statistics.fmean(of[side][part] for of in results["swapped"]) for side in sides]
        parts.append([part, *(f"{mean:.3f}" for mean in means)])
    known = [["in `tasks`: method", "model", *(f"{split} examples" for split in ("train", "test"))]]
    for method, of in results["remembered"].items():
        for model in of[0]:
            means = [statistics.fmean(one[model][s] for one in of) for s in ("train", "test")]
            known.append([f"`{method}`", model, *(f"{mean:.3f}" for mean in means)])
    terms = [["Pilot's stage 2", "value"]]
    for term in results["mixed"][0]:
        terms.append([term, f"{statistics.fmean(of[term] for of in results['mixed']):.2f}"])
    tables = "\n".join(markdown(table) for table in (rows, parts, known, terms))
    return f"{tables}\n{note(record)}\n"


def methods_table(scores: pd.DataFrame, methods: Sequence[str]) -> str:
    """Return a row per method: mean and effect against Pilot in every scenario."""
    effects = {s: against_pilot(scores, s, methods) for s in EVERYWHERE}
    rows = [["method", *(cell for s in EVERYWHERE for cell in (TITLES[s], "method − `pilot`"))]]
    for method in methods:
        row = [method]
        for scenario in EVERYWHERE:
            row.append(_score(scores, scenario, method))
            found, p = effects[scenario].get(method, (None, None))
            text = "" if found is None else interval_text(found.difference, sign="+")
            row.append(f"**{text}**" if p is not None and p < SIGNIFICANT else text)
        rows.append(row)
    seeds = sorted({found.seeds for of in effects.values() for found, _ in of.values()})
    counts = ", ".join(f"{TITLES[s]} {len(select(scores, s)):,}" for s in EVERYWHERE)
    return (
        f"{markdown(rows)}\nMean over tasks and seeds, and its difference to Pilot with the 95 % "
        "interval; bold: p < .05 after Holm's correction over the methods of a scenario. Seeds: "
        f"{', '.join(map(str, seeds))}; test rows in all: {counts}.\n"
    )


def _score(scores: pd.DataFrame, scenario: str, method: str, kind: str = "") -> str:
    """Format a method's mean; empty if it did not run."""
    mean = mean_score(select(scores, scenario, kind), method)
    return "" if math.isnan(mean) else f"{mean:.3f}"


def kinds_table(scores: pd.DataFrame, methods: Sequence[str]) -> str:
    """Return a row per method: the mean by kind of row in every scenario."""
    columns = [(s, kind) for s in EVERYWHERE for kind in KINDS[s]]
    rows = [["method", *(f"{TITLES[s]}: `{kind}`" for s, kind in columns)]]
    rows += [[m, *(_score(scores, s, m, kind) for s, kind in columns)] for m in methods]
    return f"{markdown(rows)}\n"


def overview_table(scores: pd.DataFrame) -> str:
    """Return the README's table: some methods' means."""
    rows = [["method", *(TITLES[s] for s in EVERYWHERE)]]
    rows += [[method, *(_score(scores, s, method) for s in EVERYWHERE)] for method in OVERVIEW]
    return f"{markdown(rows)}\n"


def questions_table(scores: pd.DataFrame) -> str:
    """Return a row per registered question and scenario."""
    rows = [["part of Pilot", "contrast", "scenario", "rows", "seeds", "effect", "p", "p (Holm)"]]
    for question, scenario, found, p in answers(scores):
        kind = f" `{question.kind}`" if question.kind else ""
        rows.append(
            [
                question.part,
                f"`{question.method}` − `{question.without}`",
                TITLES[scenario],
                f"{found.rows:,}{kind}",
                str(found.seeds),
                interval_text(found.difference, sign="+"),
                p_text(found.p),
                p_text(p),
            ]
        )
    return f"{markdown(rows)}\n"


def variants_table(scores: pd.DataFrame) -> str:
    """Return Pilot's further settings in `tasks`."""
    part = select(scores, "tasks")
    rows = [["setting", "mean", "setting − `pilot`", "p, uncorrected"]]
    rows.append([f"`{PILOT}`", _score(scores, "tasks", PILOT), "", ""])
    for variant in VARIANTS:
        if (found := effect(part, variant, PILOT)) is not None:
            text = interval_text(found.difference, sign="+")
            rows.append([f"`{variant}`", _score(scores, "tasks", variant), text, p_text(found.p)])
    return f"{markdown(rows)}\n"


def auto_table(scores: pd.DataFrame) -> str:
    """Return `pilot_auto` beside the two methods with which it is compared."""
    methods = (*RIVALS, "pilot_auto")
    rows = [["scenario", *(f"`{m}`" for m in methods), *(f"`pilot_auto` − `{r}`" for r in RIVALS),
             "p above `pilot_all_neighbors`", f"non-inferior by {MARGIN:g}"]]  # fmt: skip
    for scenario, verdict in verdicts(scores).items():
        over = [interval_text(verdict.over[rival].difference, sign="+") for rival in RIVALS]
        means = [_score(scores, scenario, method) for method in methods]
        decided = "yes" if verdict.not_worse else "not shown"
        rows.append([TITLES[scenario], *means, *over, p_text(verdict.p), decided])
    return f"{markdown(rows)}\n"


def neighbors_table(chosen: pd.DataFrame) -> str:
    """Return the mean number of a client's neighbours: all, of the same task, of the same house."""
    rows = [["scenario", "method", "neighbours", "of its task", "of its house"]]
    means = chosen.groupby(["scenario", "method"])[list(NEIGHBORS)].mean()
    for scenario, method in product(EVERYWHERE, CHOOSING):
        if (scenario, method) in means.index:
            counts = means.loc[scenario, method]
            rows.append([TITLES[scenario], f"`{method}`", *(f"{mean:.1f}" for mean in counts)])
    seeds = count(chosen["seed"].nunique(), "seed")
    return f"{markdown(rows)}\nMeans over clients, exchanges and {seeds}.\n"


def source_of(runs: pd.DataFrame, record: dict[str, Any]) -> str:
    """Return number, time, code and machine of the runs."""
    changed = runs["changed"].astype(bool).map({True: "+", False: ""})
    commits = ", ".join(sorted(set(runs["commit"].str[:12] + changed)))
    machine = record["machine"]
    return (
        f"`runs.csv`: {len(runs)} runs of {runs['seconds'].sum() / 3600:.1f} h in all; commit "
        f"{commits}; {'; '.join(sorted(set(runs['versions'])))}; "
        f"{record['results']['in_parallel']} in parallel on {machine['cores']} cores of "
        f"{machine['cpu']}"
    )


def _record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
