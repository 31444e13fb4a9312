"""Effects of methods on the emoji federations, with intervals.

An effect is the mean difference of two methods' scores on the same test examples: the mean over
seeds and tasks of the mean over a task's examples. Examples of one seed share clients and training
runs, those of one concept share the answer. The variance is two-way cluster-robust (Cameron,
Gelbach & Miller, JBES 2011, with statsmodels), V = V_s + V_c - V_sc by seed, by concept and by
both, but never below V_s or V_c. Intervals are Student's t with Satterthwaite's degrees of freedom,
V^2 / (V_s^2 / (S - 1) + V_c^2 / (C - 1)) for S seeds and C concepts.

To add a question, add it to `QUESTIONS`, before its runs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats

from emoji.federation import (
    SCENARIOS,
    SIZE,
    concept_of,
    divide,
    draw,
    kind_of,
    number_of,
    task_of,
)
from pilot_flwr.sweeps.compare import LEVEL, Interval, holm

PILOT, ALL_NEIGHBORS = "pilot", "pilot_all_neighbors"
COMPARATORS = (PILOT, ALL_NEIGHBORS)
"""The methods with which `pilot_auto` is compared."""
MARGIN = 0.02
TASKS_DIFFER = ("tasks", "untold", "both")
HOUSES_DIFFER = ("houses", "both")
ALL_SCENARIOS = ("houses", *TASKS_DIFFER)


class Question(NamedTuple):
    """The contrast `method` against `baseline`, where the part of Pilot could help."""

    part: str
    baseline: str
    scenarios: tuple[str, ...]
    kind: str = ""
    """Kind of test examples; empty: all."""
    method: str = PILOT


STAGE_1 = "pilot_stage1_only"
NO_L_D = f"{STAGE_1} train.difference_loss.weight=0"
NO_CT_MOA = f"{STAGE_1} model.client_adapter=false"
NO_PSI_C, NO_PSI_S = "pilot_no_cross_task_adapters", "pilot_no_client_adapter"
NO_PRIVATE = f"{NO_PSI_C} model.client_adapter=false"
QUESTIONS = (
    Question("federation", "local", ALL_SCENARIOS),
    Question("Pilot or one model", "fedit", ALL_SCENARIOS),
    Question("Pilot or one model per task", "fedavg_per_task", TASKS_DIFFER),
    Question("adapters averaged per task", "pilot_global_adapters", TASKS_DIFFER),
    Question("ATA or one mean LoRA", "pilot_fedavg_lora", ALL_SCENARIOS),
    Question("nearest neighbours or all", "pilot_all_neighbors", ALL_SCENARIOS),
    Question("client adapter and L_d", NO_PSI_S, HOUSES_DIFFER, "other_house"),
    Question("L_d in exchange 1", "pilot_no_difference_loss", HOUSES_DIFFER, "other_house"),
    Question("L_d in all", NO_L_D, HOUSES_DIFFER, "other_house", STAGE_1),
    Question("stage 2", STAGE_1, TASKS_DIFFER, "other_task"),
    Question("CT-MoA", NO_CT_MOA, TASKS_DIFFER, "other_task", NO_PSI_S),
    Question("cross-task adapters", NO_PSI_C, TASKS_DIFFER, "other_task"),
)
"""Specified before any test result: the contrasts `method` − `baseline`."""

VARIANTS = (
    "pilot_m1",
    "pilot_no_self_weight",
    "pilot_no_router_losses",
    "pilot_official_init",
    "pilot train.balance_loss.reduction=per_image",
    "pilot model.sent_dtype=int8",
    "pilot model.sent_dtype=int4",
    "pilot train.clipping=global",
    "pilot strategy.num_neighbors=4",
)
"""Further settings of Pilot, in `tasks`: described, not tested."""

ADDED = (NO_PRIVATE,)
"""Added after seeds 0 and 1: in all scenarios, described, not tested."""

ABLATIONS = {
    label: tuple(
        dict.fromkeys(s for q in QUESTIONS if label in (q.method, q.baseline) for s in q.scenarios)
    )
    for label in dict.fromkeys(label for q in QUESTIONS for label in (q.method, q.baseline))
    if label.startswith("pilot_")
}
ABLATIONS |= dict.fromkeys(VARIANTS, ("tasks",)) | dict.fromkeys(ADDED, ALL_SCENARIOS)
"""Variant of Pilot → the scenarios in which it runs."""


class Effect(NamedTuple):
    """A mean difference with its 95 % interval, and p of the two-sided test against zero.

    For a single seed there are neither.
    """

    difference: Interval
    p: float | None
    seeds: int
    rows: int
    concepts: int

    def p_above(self) -> float | None:
        """Return p of the one-sided test against zero or less."""
        if self.p is None:
            return None
        return self.p / 2 if self.difference.mean > 0 else 1 - self.p / 2

    def interval_above(self, limit: float) -> bool:
        """Whether the whole interval is above `limit`."""
        mean, half_width = self.difference
        return half_width is not None and mean - half_width > limit


def select(scores: pd.DataFrame, scenario: str, kind: str = "") -> pd.DataFrame:
    """Return the rows of a scenario, all or of one kind."""
    found = scores.xs(scenario, level="scenario")
    return found[found.index.get_level_values("row").map(kind_of) == kind] if kind else found


def weights_of(scores: pd.DataFrame) -> "pd.Series[float]":
    """Return row weights with sum 1: seeds weigh equally, and so do the tasks of a seed."""
    tasks = scores.index.get_level_values("client").map(task_of)
    weights = 1 / scores.groupby([scores.index.get_level_values("seed"), tasks]).transform("size")
    return weights / weights.sum()


def mean_score(scores: pd.DataFrame, method: str) -> float:
    """Return a method's mean over its seeds, over tasks and rows; NaN if it did not run."""
    ran = scores[[method]].dropna()
    return float((ran[method] * weights_of(ran)).sum()) if len(ran) else float("nan")


class Fit(NamedTuple):
    """A mean difference of `rows` rows, and its variances by seed, concept and both."""

    mean: float
    by_seed: float
    by_concept: float
    by_both: float
    seeds: int
    concepts: int
    rows: int

    def error(self) -> tuple[float, float]:
        """Return the standard error and its degrees of freedom."""
        two_way = self.by_seed + self.by_concept - self.by_both
        variance = max(self.by_seed, self.by_concept, two_way)
        spread = self.by_seed**2 / (self.seeds - 1) + self.by_concept**2 / (self.concepts - 1)
        return variance**0.5, variance**2 / spread if spread > 0 else 1.0


def fit(scores: pd.DataFrame, method: str, baseline: str) -> Fit | None:
    """Fit the mean difference on the rows that both scored; None if no row has both."""
    both = scores[[method, baseline]].dropna()
    if both.empty:
        return None
    seeds = pd.factorize(both.index.get_level_values("seed"))[0]
    concepts = pd.factorize(both.index.get_level_values("row").map(concept_of))[0]
    differences = both[method] - both[baseline]
    model = sm.WLS(differences, np.ones(len(both)), weights=weights_of(both))
    mean = float(model.fit().params.iloc[0])
    groups = [seeds, concepts, pd.factorize(seeds * len(both) + concepts)[0]]
    numbers = [len(set(group)) for group in groups]
    variances = [
        float(model.fit(cov_type="cluster", cov_kwds={"groups": group}).cov_params().iloc[0, 0])
        if number > 1
        else 0.0
        for group, number in zip(groups, numbers, strict=True)
    ]
    return Fit(mean, *variances, *numbers[:2], len(both))


def effect(scores: pd.DataFrame, method: str, baseline: str) -> Effect | None:
    """Return the effect of `method` instead of `baseline`; None if no row has both."""
    found = fit(scores, method, baseline)
    if found is None:
        return None
    counts = found.seeds, found.rows, found.concepts
    if found.seeds == 1:
        return Effect(Interval(found.mean, None), None, *counts)
    error, freedom = found.error()
    half_width = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(found.mean) / error, freedom)) if error > 0 else 1.0
    return Effect(Interval(found.mean, half_width), p, *counts)


def contrast(scores: pd.DataFrame, question: Question, scenario: str, kind: str) -> Effect | None:
    """Return a question's effect in a scenario on all rows, or on those of a kind."""
    return effect(select(scores, scenario, kind), question.method, question.baseline)


Key = TypeVar("Key")


def corrected(
    effects: Mapping[Key, Effect | None], *, above: bool = False
) -> dict[Key, tuple[Effect, float | None]]:
    """Return each effect that is not None with its Holm-corrected p, one-sided if `above`."""
    ran = {key: one for key, one in effects.items() if one is not None}
    adjusted = holm([one.p_above() if above else one.p for one in ran.values()])
    return dict(zip(ran, zip(ran.values(), adjusted, strict=True), strict=True))


class Finding(NamedTuple):
    """A question's effect in one scenario, with Holm's p over the question's scenarios."""

    question: Question
    scenario: str
    effect: Effect
    p: float | None


def findings(scores: pd.DataFrame, questions: Sequence[Question] = QUESTIONS) -> list[Finding]:
    """Return every question's effect in each of its scenarios, with Holm's p."""
    found = []
    for question in questions:
        effects = {
            scenario: contrast(scores, question, scenario, question.kind)
            for scenario in question.scenarios
        }
        found += [Finding(question, s, one, p) for s, (one, p) in corrected(effects).items()]
    return found


def drawing_seen(scores: pd.DataFrame) -> "pd.Series[bool]":
    """Whether a client of another task trains on the drawing that a row of `both` tests."""
    scenario = SCENARIOS["both"]
    concepts = sorted(divide().trained())
    seen: dict[tuple[int, str, str], set[str]] = {}
    for seed in scores.index.unique("seed"):
        for task, clients in draw(scenario, concepts, size=SIZE, seed=int(seed)).items():
            for one in clients:
                seen.setdefault((seed, task, one.house), set()).update(one.concepts)
    found = [
        any(
            concept_of(row) in seen[seed, other, scenario.house(number_of(client))]
            for other in scenario.tasks
            if other != task_of(client)
        )
        for seed, client, row in scores.index
    ]
    return pd.Series(found, scores.index)


def against_pilot(
    scores: pd.DataFrame, scenario: str, methods: Sequence[str]
) -> dict[str, tuple[Effect, float | None]]:
    """Return every method's effect against Pilot on all rows, with Holm's p over the methods."""
    rows = select(scores, scenario)
    return corrected({method: effect(rows, method, PILOT) for method in methods if method != PILOT})


class AutoComparison(NamedTuple):
    """`pilot_auto` in one scenario."""

    over: dict[str, Effect]
    """Its effect against each of `COMPARATORS`."""
    p: float | None
    """One-sided p of `pilot_auto` > `pilot_all_neighbors`, Holm over `TASKS_DIFFER`."""
    non_inferior: bool
    """Whether both intervals are above minus `MARGIN`."""


def auto_comparisons(scores: pd.DataFrame) -> dict[str, AutoComparison]:
    """Compare `pilot_auto` with both `COMPARATORS` in every scenario."""
    over: dict[str, dict[str, Effect]] = {}
    for scenario in ALL_SCENARIOS:
        rows = select(scores, scenario)
        effects = {other: effect(rows, "pilot_auto", other) for other in COMPARATORS}
        over[scenario] = {other: one for other, one in effects.items() if one is not None}
    tested = corrected({s: over[s].get(ALL_NEIGHBORS) for s in TASKS_DIFFER}, above=True)
    return {
        scenario: AutoComparison(
            of,
            tested[scenario][1] if scenario in tested else None,
            all(one.interval_above(-MARGIN) for one in of.values()),
        )
        for scenario, of in over.items()
        if len(of) == len(COMPARATORS)
    }
