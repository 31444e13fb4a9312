"""Effects of methods on the emoji federations, with intervals.

An effect is a mean difference of two methods' scores of the same test rows: the mean over seeds
and tasks of the mean over a task's rows. Rows that share a seed share the drawn clients and one
training run per client; rows that share a concept share a picture. The variance allows for both:
the largest of those by clusters of seeds, of concepts and of both (Cameron, Gelbach & Miller, JBES
2011, from statsmodels); the last alone can be too small, even negative. The interval uses Student's
t with one degree of freedom less than there are seeds.

To add a question, add it to `QUESTIONS`, before its runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats

from pilot_flwr.sweeps.compare import LEVEL, Interval, holm

PILOT, POWER = "pilot", 0.8
TASKS_DIFFER = ("tasks", "untold", "both")
HOUSES_DIFFER = ("houses", "both")
EVERYWHERE = ("houses", *TASKS_DIFFER)


class Question(NamedTuple):
    """A part of Pilot, the method without it, and where the part could help."""

    part: str
    without: str
    scenarios: tuple[str, ...]
    kind: str = ""
    """Rows of this kind only; empty: all."""


QUESTIONS = (
    Question("federation", "local", EVERYWHERE),
    Question("Pilot or one model for all", "fedit", EVERYWHERE),
    Question("Pilot or one model per task", "fedavg_per_task", TASKS_DIFFER),
    Question("averaging per task", "pilot_global_adapters", TASKS_DIFFER),
    Question("ATA", "pilot_fedavg_lora", EVERYWHERE),
    Question("ψ_s", "pilot_no_client_adapter", HOUSES_DIFFER, "house"),
    Question("L_d", "pilot_no_difference_loss", HOUSES_DIFFER, "house"),
    Question("CT-MoA", "pilot_stage1_only", TASKS_DIFFER, "other"),
    Question("ψ_c", "pilot_no_cross_task_adapters", TASKS_DIFFER, "other"),
)
"""Registered before any test result: the contrasts `pilot` − `without`."""

ABLATIONS = {
    **{q.without: q.scenarios for q in QUESTIONS if q.without.startswith("pilot_")},
    "pilot_all_neighbors": EVERYWHERE,
    "pilot_m1": ("tasks",),
    "pilot_no_self_weight": ("tasks",),
    "pilot_no_router_losses": ("tasks",),
    "pilot_official_init": ("tasks",),
}
"""Where each variant of Pilot runs: where a question asks for it, the last four in one scenario."""


class Effect(NamedTuple):
    """A mean difference with its 95 % interval, and p of the two-sided test against zero."""

    difference: Interval
    p: float
    seeds: int
    rows: int


def select(scores: pd.DataFrame, scenario: str, kind: str = "") -> pd.DataFrame:
    """Return the rows of a scenario, all or of one kind."""
    found = scores.xs(scenario, level="scenario")
    return found[kinds_of(found) == kind] if kind else found


def kinds_of(scores: pd.DataFrame) -> "pd.Series[str]":
    """Return every row's kind."""
    return scores.index.get_level_values("row").to_series(index=scores.index).str.split("/").str[0]


def weights_of(scores: pd.DataFrame) -> "pd.Series[float]":
    """Return row weights with sum one that give every seed and every task of a seed the same."""
    clients = scores.index.get_level_values("client").to_series(index=scores.index)
    cells = [scores.index.get_level_values("seed"), clients.str.rpartition("-")[0]]
    per_cell = scores.groupby(cells).transform("size")
    weights = 1 / per_cell
    return weights / weights.sum()


def mean_score(scores: pd.DataFrame, method: str) -> float:
    """Return a method's mean over seeds, tasks and rows; NaN if it failed."""
    return float((scores[method] * weights_of(scores)).sum(skipna=False))


class Fit(NamedTuple):
    """A mean difference, and its variance by the clusters that are allowed for."""

    mean: float
    by_concept: float
    by_seed: float
    by_both: float
    concepts: int
    seeds: int
    rows: int


def fit(scores: pd.DataFrame, method: str, baseline: str) -> Fit:
    """Fit the mean difference on a scenario's rows; variances by seed are 0 for a single one."""
    both = scores[[method, baseline]].dropna()
    seeds = pd.factorize(both.index.get_level_values("seed"))[0]
    concepts = pd.factorize(both.index.get_level_values("row").str.split("/").str[1])[0]
    differences = both[method] - both[baseline]
    model = sm.WLS(differences, np.ones(len(both)), weights=weights_of(both))
    num_seeds = len(set(seeds))
    groups = [concepts, seeds, np.column_stack([seeds, concepts])][: 3 if num_seeds > 1 else 1]
    fits = [model.fit(cov_type="cluster", cov_kwds={"groups": group}) for group in groups]
    variances = [float(one.cov_params().iloc[0, 0]) for one in fits]
    by_concept, by_seed, by_both = (*variances, 0.0, 0.0)[:3]
    mean = float(fits[0].params.iloc[0])
    return Fit(mean, by_concept, by_seed, by_both, len(set(concepts)), num_seeds, len(both))


def effect(scores: pd.DataFrame, method: str, baseline: str) -> Effect:
    """Return the effect of `method` instead of `baseline` on a scenario's rows."""
    found = fit(scores, method, baseline)
    error = max(found.by_concept, found.by_seed, found.by_both) ** 0.5
    freedom = (found.seeds if found.seeds > 1 else found.concepts) - 1
    half_width = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(found.mean) / error, freedom)) if error > 0 else 1.0
    return Effect(Interval(found.mean, half_width), p, found.seeds, found.rows)


def detectable(found: Fit, *, seeds: int, concepts: int) -> float:
    """Return the difference that `seeds` and `concepts` show with 80 % power at the 5 % level.

    The variance by seed shrinks with their number, that by concept with theirs; the larger decides,
    as in `effect`.
    """
    error = max(found.by_seed * found.seeds / seeds, found.by_concept * found.concepts / concepts)
    quantiles = stats.t.ppf([(1 + LEVEL) / 2, POWER], seeds - 1)
    return float(quantiles.sum() * error**0.5)


class Answer(NamedTuple):
    """A question's effect in one scenario, with Holm's p over all answers."""

    question: Question
    scenario: str
    effect: Effect
    p: float | None


def answers(scores: pd.DataFrame, questions: Sequence[Question] = QUESTIONS) -> list[Answer]:
    """Return the effects of Pilot's parts where they could help."""
    found = [
        (
            question,
            scenario,
            effect(select(scores, scenario, question.kind), PILOT, question.without),
        )
        for question in questions
        for scenario in question.scenarios
    ]
    adjusted = holm([one.p for _, _, one in found])
    return [Answer(*one, p) for one, p in zip(found, adjusted, strict=True)]


def against_pilot(
    scores: pd.DataFrame, scenario: str, methods: Sequence[str]
) -> dict[str, tuple[Effect, float | None]]:
    """Return every method's effect against Pilot on all rows, with Holm's p over the methods."""
    rows = select(scores, scenario)
    found = {method: effect(rows, method, PILOT) for method in methods if method != PILOT}
    adjusted = holm([one.p for one in found.values()])
    return {method: (one, p) for (method, one), p in zip(found.items(), adjusted, strict=True)}


def verdicts(scores: pd.DataFrame) -> dict[str, tuple[Effect, float, Effect]]:
    """Return per scenario: `pilot_auto` against all neighbours, against the better rule.

    The p between them is one-sided: whether `pilot_auto` is above all neighbours.
    """
    found = {}
    for scenario in EVERYWHERE:
        rows = select(scores, scenario)
        over_all = effect(rows, "pilot_auto", "pilot_all_neighbors")
        p = over_all.p / 2 if over_all.difference.mean > 0 else 1 - over_all.p / 2
        means = {method: mean_score(rows, method) for method in (PILOT, "pilot_all_neighbors")}
        better = max(means, key=means.__getitem__)
        found[scenario] = (over_all, p, effect(rows, "pilot_auto", better))
    return found
