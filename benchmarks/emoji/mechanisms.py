"""Measure transfer between tasks, and the effect of Pilot's private adapters.

    python benchmarks/emoji/mechanisms.py

writes ``benchmarks/results/emoji/mechanisms.csv.gz``, the score of every test row in two groups of
runs with seeds 0 and 1:

- `same_tasks`, three tasks with identical questions and answers: another task's adapter and LoRA
  have learnt what the client is tested on in the rows ``other_task``.
- `tasks`: Pilot with and without stage 2, ψ_s and ψ_c, with equal learning rates. Added after
  seed 0 of the comparison, as are `forced` and `without` in ``mechanisms.json``, which has:

- `swapped`: scores of `fedavg_per_task` in `same_tasks` when a task uses its own or another task's
  adapter, and its own or the other's LoRA. Tested on concepts that the other task trains on and the
  own one does not and, as a control, on concepts that both train on.
- `forced`: scores of Pilot in `same_tasks`, with the router as trained or with all weight on one
  adapter; and the trained router's weight on the adapter of the task that trains on the concept.
- `without`: scores in `tasks` on training and on test examples of the personalised models, as
  trained and with private adapters taken out.
- `terms`: in Pilot's stage 2, the router's entropy divided by log T; the root mean square of what
  each part adds to x_img, divided by that of the projector's output; the cosine similarity of what
  two tasks' adapters add; and ψ_c's share of the connector's squared gradient norm.
"""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, permutations, product
from pathlib import Path
from typing import get_args

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _record import write_record
from torch import Tensor, nn

from emoji.analysis import NO_CT_MOA, NO_PRIVATE, NO_PSI_C, NO_PSI_S, PILOT, STAGE_1
from emoji.compare import FOLDER, write_scores
from emoji.federation import SAME_TASKS, concept_of, write_federation
from emoji.runs import PACKAGES, Job, folder_of, parser, run_all
from emoji.search import SCALE, job_of, label_of, rate_of
from pilot_flwr.algorithm.connector import CrossTaskMoA, TaskClientConnector
from pilot_flwr.algorithm.parameter_groups import set_trainable
from pilot_flwr.client.personalization import personalize_as_trained
from pilot_flwr.client.training import accumulate
from pilot_flwr.data.client_files import Split
from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import Client, client_examples, task_metric
from pilot_flwr.inference.generate import Answerer
from pilot_flwr.inference.runs import Run, load_model, open_run, select_client, select_consensus
from pilot_flwr.metrics import METRICS
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.slot import Visual

PER_TASK = "fedavg_per_task"
METHODS = (
    "fedit",
    PER_TASK,
    PILOT,
    "pilot_all_neighbors",
    "pilot_global_adapters",
    NO_PSI_C,
    NO_PSI_S,
    STAGE_1,
    NO_CT_MOA,
)
"""Of `same_tasks`, each at its rate of the comparison."""
PARTS = (PER_TASK, NO_CT_MOA, STAGE_1, NO_PRIVATE, NO_PSI_S, NO_PSI_C, PILOT)
OPENED = (PER_TASK, NO_CT_MOA, STAGE_1, NO_PRIVATE, PILOT)
"""Those of `PARTS` whose models `without` evaluates, at the rates of the comparison."""
SCALES = (0.5, 1)
"""Of `PARTS`: 0.5 was chosen for `pilot`, 1 for `fedavg_per_task` and `pilot_stage1_only`."""
SEEDS = (0, 1)
NAME = "same_tasks"
REMOVED = {
    "as trained": (),
    "without ψ_s": ("client_adapter",),
    "without ψ_c": ("cross_task_adapters",),
    "without both": ("client_adapter", "cross_task_adapters"),
}
"""Name → the connector's parts that are taken out."""
ROUTED = "router's weight on the adapter of the task that trains on them"
CPU = torch.device("cpu")


class Sum(nn.Module):
    """Adds the outputs of several modules."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, features: Tensor) -> Tensor:
        """Return the sum."""
        return torch.stack([part(features) for part in self.parts]).sum(0)


def swapped(run: Run) -> dict[str, dict[str, float]]:
    """Return the mean scores with own and other parts, by the tasks that train on the concepts."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    known = _trained_concepts(run)
    for own, other in permutations(known, 2):
        examples = _by_concept(run, own, "test")
        sides = {
            "concepts of the other task": known[other] - known[own],
            "concepts of both": known[other] & known[own],
        }
        received = {task: run.received(select_consensus(run, task)) for task in (own, other)}
        origin = {own: "own", other: "other"}
        model = load_model(run, select_consensus(run, own), device=CPU)
        answerer = Answerer(run.config, model, keep=True)
        for adapter, lora in product((own, other), repeat=2):
            parts = replace(
                received[own],
                adapters={own: received[adapter].adapters[adapter]},
                lora=received[lora].lora,
            )
            personalize_as_trained(model, None, parts)
            for side, concepts in sides.items():
                asked = [examples[concept] for concept in sorted(concepts & set(examples))]
                found = _scores(answerer, asked, "exact_match")
                scores[side][f"{origin[adapter]} adapter, {origin[lora]} LoRA"] += found
    return {side: _means(of) for side, of in scores.items()}


def forced(run: Run) -> dict[str, dict[str, float]]:
    """Return mean scores with the trained router and with all weight on one adapter.

    By which task trains on the concept: only the client's own, or only one other. `ROUTED` is no
    score, but the trained router's mean weight on that task's adapter.
    """
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    known = _trained_concepts(run)
    for client in run.clients():
        model = load_model(run, select_client(run, client.id), device=CPU)
        answerer = Answerer(run.config, model, keep=True)
        trained = model.connector
        assert isinstance(trained, CrossTaskMoA)
        examples = {concept_of(e.id): e for e in _examples(run, client, "test")}
        own, *foreign = trained.tasks
        for task, adapters in product(trained.tasks, foreign):
            if task not in (own, adapters):
                continue
            elsewhere = set().union(*(known[other] for other in known if other != task))
            concepts = sorted((known[task] - elsewhere) & set(examples))
            asked = [examples[concept] for concept in concepts]
            if not asked:
                continue
            side = "own task" if task == own else "other task"
            weights = trained.route(_visual(answerer, asked).features).probs
            scores[ROUTED][side] += weights[..., trained.tasks.index(task)].mean(1).tolist()
            for name, connector in forced_connectors(trained, adapters).items():
                model.slot.pilot = connector
                scores[name][side] += _scores(answerer, asked, "exact_match")
    return {name: _means(of) for name, of in scores.items()}


def forced_connectors(
    trained: CrossTaskMoA, task: str
) -> dict[str, CrossTaskMoA | TaskClientConnector]:
    """Return connectors with all weight on the own task's adapter or that of `task`, and ψ_s."""
    own, client_adapter = trained.task_adapters[trained.tasks[0]], trained.client_adapter
    shared, crossed = trained.task_adapters[task], trained.cross_task_adapters
    assert crossed is not None
    return {
        "router as trained": trained,
        "all on own task's ψ_t": TaskClientConnector(own, client_adapter),
        "all on other task's ψ_t": TaskClientConnector(shared, client_adapter),
        "all on other task's ψ_t + ψ_c": TaskClientConnector(
            Sum(shared, crossed[task]), client_adapter
        ),
    }


def without(run: Run) -> dict[str, dict[str, float]]:
    """Return the mean scores on both splits with private adapters taken out."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for client in run.clients():
        model = load_model(run, select_client(run, client.id), device=CPU)
        answerer = Answerer(run.config, model, keep=True)
        metric = task_metric(run.config.data, client.task)
        parts = {n: p for n, p in model.connector.named_children() if n in REMOVED["without both"]}
        for name, removed in REMOVED.items():
            if not set(removed) <= set(parts):
                continue  # stage 1 has no ψ_c
            for part in removed:
                setattr(model.connector, part, None)
            for split in get_args(Split):
                found = _scores(answerer, list(_examples(run, client, split)), metric)
                scores[name][split].append(statistics.fmean(found))
            for part in removed:
                setattr(model.connector, part, parts[part])
    return {name: _means(of) for name, of in scores.items()}


def terms(run: Run) -> dict[str, float]:
    """Return the router's entropy and the sizes of the parts' effects, means over clients."""
    found: dict[str, list[float]] = defaultdict(list)
    for client in run.clients():
        for name, value in _terms(run, client).items():
            found[name].append(value)
    return _means(found)


@torch.no_grad()
def _terms(run: Run, client: Client) -> dict[str, float]:
    model = load_model(run, select_client(run, client.id), device=CPU)
    connector = model.connector
    assert isinstance(connector, CrossTaskMoA)
    answerer = Answerer(run.config, model)
    share = gradient_share(answerer, list(_examples(run, client, "train")))
    features = _visual(answerer, list(_examples(run, client, "test"))).features
    base = model.slot.projector(features)
    parts, learnt = added(connector, features, base)
    similarity = [
        float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
        for a, b in combinations(learnt.values(), 2)
    ]
    probabilities = connector.route(features).probs
    entropy = torch.special.entr(probabilities).sum(-1).mean()
    return {
        "router's entropy": float(entropy) / math.log(len(connector.tasks)),
        "router's weight on the own task": float(probabilities[..., 0].mean()),
        **{f"size of {name}": float(_size(part) / _size(base)) for name, part in parts.items()},
        "cosine of two tasks' ψ_t": statistics.fmean(similarity),
        "share of ψ_c in the connector's gradient": share,
    }


@torch.enable_grad()
def gradient_share(answerer: Answerer, examples: list[Example]) -> float:
    """Return the cross-task adapters' share of the connector's squared gradient norm.

    The gradient is that of the training loss on all `examples`; only what stage 2 trains has one.
    """
    model, batch = answerer.model, answerer.collator.train_batch(examples)
    set_trainable(model.groups(), stage=2)
    accumulate(model, [batch], iter([_visual(answerer, examples)]), answerer.config.train)
    squares = {
        group: sum(float(p.grad.square().sum()) for p in parameters.values() if p.grad is not None)
        for group, parameters in model.groups().items()
        if group != "lora"
    }
    return squares["cross_task_adapters"] / sum(squares.values())


def _visual(answerer: Answerer, examples: list[Example]) -> Visual:
    """Return what the vision tower sees in some examples' pictures."""
    cache = FeatureCache(answerer.config.model.feature_cache)
    return cache.encode(answerer.model, answerer.processor, examples)


def added(
    connector: CrossTaskMoA, features: Tensor, base: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what each part adds to x_img, and what every task's adapter does without its weight.

    Every ψ_t starts as the projector, whose output is `base`, ψ_s and ψ_c as zero; so x_img is
    `base` plus all parts.
    """
    probabilities = connector.route(features).probs
    weight = {task: probabilities[..., i, None] for i, task in enumerate(connector.tasks)}
    learnt = {task: connector.task_adapters[task](features) - base for task in connector.tasks}
    own, *foreign = connector.tasks
    crossed, client_adapter = connector.cross_task_adapters, connector.client_adapter
    assert crossed is not None and client_adapter is not None
    parts = {
        "ψ_s": client_adapter(features),
        "own task's ψ_t": weight[own] * learnt[own],
        "other tasks' ψ_t": _total(weight[task] * learnt[task] for task in foreign),
        "ψ_c": _total(weight[task] * crossed[task](features) for task in foreign),
    }
    return parts, learnt


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def _size(term: Tensor) -> Tensor:
    return term.square().mean().sqrt()


def _trained_concepts(run: Run) -> dict[str, set[str]]:
    """Return the concepts that each task's clients train on."""
    return {task: set(_by_concept(run, task, "train")) for task in run.checkpoint.tasks}


def _by_concept(run: Run, task: str, split: Split) -> dict[str, Example]:
    """Return an example of every concept that a task's clients have in a split."""
    clients = [client for client in run.clients() if client.task == task]
    return {concept_of(e.id): e for client in clients for e in _examples(run, client, split)}


def _examples(run: Run, client: Client, split: Split) -> Iterator[Example]:
    found = client_examples(run.config.data, client, split, seed=run.config.seed)
    return (found[index] for index in range(len(found)))


def _scores(answerer: Answerer, examples: list[Example], metric: str) -> list[float]:
    references = [tuple(example.answers) for example in examples]
    return list(METRICS[metric].score(answerer(examples), references).each) if examples else []


def _means(scores: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.fmean(values), 4) for name, values in scores.items()}


def at_scale(label: str, seed: int, scale: float) -> Job:
    """Return the job of a method in `tasks` with a learning-rate scale."""
    return job_of("tasks", seed, label, rate=f"{SCALE}={scale}")


def label_with_rate(job: Job) -> str:
    """Return a job's method with all its settings."""
    return " ".join((job.method, *job.overrides))


def main() -> None:
    """Run, and write what was found."""
    options = parser(__doc__).parse_args()
    options.out = options.out / "kept"  # the comparison's runs are kept without their models
    for seed in SEEDS:
        write_federation(options.data, NAME, SAME_TASKS, split="test", seed=seed)
    same = [job_of(NAME, seed, label) for label in METHODS for seed in SEEDS]
    parts = [at_scale(label, seed, scale) for label in PARTS for scale in SCALES for seed in SEEDS]
    found = run_all(same + parts, options, keep=True)
    write_scores(found, FOLDER / "mechanisms.csv.gz", label=label_with_rate)

    def runs(jobs: Iterable[Job], label: str) -> list[Run]:
        rate = rate_of(label.split()[0])
        mine = (job for job in jobs if label_of(job) == label and job.overrides[:1] == rate)
        return [open_run(folder_of(job, options)) for job in mine]

    results = {
        "swapped": [swapped(run) for run in runs(same, PER_TASK)],
        "forced": [forced(run) for run in runs(same, PILOT)],
        "without": {label: [without(run) for run in runs(parts, label)] for label in OPENED},
        "terms": {
            name: [terms(run) for run in runs(jobs, PILOT)]
            for name, jobs in (("tasks", parts), (NAME, same))
        },
    }
    write_record(FOLDER / "mechanisms.json", results, packages=PACKAGES)


if __name__ == "__main__":
    main()
