"""Measure what can pass between tasks: identical tasks, exchanged parts, what the router mixes.

    python benchmarks/emoji/why.py

writes ``benchmarks/results/emoji/why.csv.gz``, the score of every test row of three tasks with
identical questions and answers: another task's adapter and LoRA have learnt exactly what the
client is tested on in the rows ``other_task``. ``why.json`` has:

- `swapped`: scores of `fedavg_per_task` when a task uses its own or another task's adapter, and its
  own or the other's LoRA. Tested on concepts that only the other task trains on and, as a control,
  on concepts that both train on.
- `remembered`: in `tasks`, the mean score on training and on test examples of the clients' models,
  and of what the clients of a task send, alone. Added after seed 0 of the comparison.
- `mixed`: in Pilot's stage 2 in `tasks`, the router's entropy divided by log T, and the root mean
  square of each term of x_img divided by that of the base's projector's output.
"""

import math
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import get_args

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _record import write_record

from emoji.analysis import PILOT
from emoji.compare import FOLDER, own_rate, write_scores
from emoji.federation import SAME_TASKS, concept_of, write_federation
from emoji.runs import PACKAGES, Job, folder_of, parser, run_all
from emoji.search import read_rates
from pilot_flwr.algorithm.connector import CrossTaskMoA
from pilot_flwr.client.personalization import personalize_as_trained
from pilot_flwr.data.client_files import Split
from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import client_examples
from pilot_flwr.inference.evaluate import EvaluationSet, evaluate_models
from pilot_flwr.inference.generate import Answerer
from pilot_flwr.inference.runs import (
    Run,
    Selected,
    load_model,
    open_run,
    select_client,
    select_consensus,
)
from pilot_flwr.metrics import METRICS
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import load_processor

PER_TASK = "fedavg_per_task"
METHODS = (
    "fedit",
    PER_TASK,
    PILOT,
    "pilot_all_neighbors",
    "pilot_global_adapters",
    "pilot_stage1_only",
    "pilot_no_cross_task_adapters",
)
SEEDS = (0, 1)
NAME = "same_tasks"
CPU = torch.device("cpu")


def swapped(run: Run) -> dict[str, dict[str, float]]:
    """Return the scores with own and other parts, by the tasks that train on the concepts."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    tasks = run.checkpoint.tasks
    known = {task: set(_examples(run, task, "train")) for task in tasks}
    for own, other in permutations(tasks, 2):
        asked = _examples(run, own, "test")
        sides = {"other task": known[other] - known[own], "both tasks": known[own] & known[other]}
        received = {task: run.received(select_consensus(run, task)) for task in (own, other)}
        whose = {own: "own", other: "other"}
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
                examples = [asked[concept] for concept in sorted(concepts & set(asked))]
                answers = answerer(examples)
                references = [tuple(example.answers) for example in examples]
                found = METRICS["exact_match"].score(answers, references).each
                scores[side][f"{whose[adapter]} adapter, {whose[lora]} LoRA"] += found
    return {
        side: {parts: round(statistics.fmean(found), 4) for parts, found in of.items()}
        for side, of in scores.items()
    }


def remembered(run: Run) -> dict[str, dict[str, float]]:
    """Return the mean scores of clients' models and of their task's sent parts, by split."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for split in get_args(Split):
        for whose, select in (
            ("client's model", lambda client: select_client(run, client.id)),
            ("sent parts alone", lambda client: select_consensus(run, client.task)),
        ):
            scored = evaluate_models(
                run,
                [(client, select(client)) for client in run.clients()],
                EvaluationSet(split),
                device=CPU,
                say=print,
                progress=lambda *_: None,
            )
            found[whose][split] = round(statistics.fmean(one.score for one in scored), 4)
    return dict(found)


def mixed(run: Run) -> dict[str, float]:
    """Return the router's entropy and the sizes of the terms of x_img, means over clients."""
    found: dict[str, list[float]] = defaultdict(list)
    for client in run.clients():
        for name, value in _terms(run, select_client(run, client.id)).items():
            found[name].append(value)
    return {name: round(statistics.fmean(values), 4) for name, values in found.items()}


@torch.no_grad()
def _terms(run: Run, selected: Selected) -> dict[str, float]:
    model = load_model(run, selected, device=CPU)
    connector = model.connector
    assert isinstance(connector, CrossTaskMoA) and selected.client is not None
    config = run.config
    processor = load_processor(config.model.path, config.model.revision)
    split = client_examples(config.data, selected.client, "test", seed=config.seed)
    cache = FeatureCache(config.model.feature_cache)
    features = cache.encode(model, processor, [split[i] for i in range(len(split))]).features
    probabilities = connector.route(features).probs
    own, *foreign = connector.tasks
    weight = {task: probabilities[..., i, None] for i, task in enumerate(connector.tasks)}
    terms = {"ψ_s": connector.client_adapter(features) if connector.client_adapter else None}
    terms["own task's ψ_t"] = weight[own] * connector.task_adapters[own](features)
    terms["other tasks' ψ_t"] = sum(
        weight[t] * connector.task_adapters[t](features) for t in foreign
    )
    crossed = connector.cross_task_adapters
    assert crossed is not None
    terms["ψ_c"] = sum(weight[t] * crossed[t](features) for t in foreign)
    base = model.slot.projector(features).square().mean().sqrt()
    entropy = torch.special.entr(probabilities).sum(-1).mean()
    sizes = {n: float(t.square().mean().sqrt() / base) for n, t in terms.items() if t is not None}
    return {"relative entropy": float(entropy / math.log(len(connector.tasks))), **sizes}


def _examples(run: Run, task: str, split: Split) -> dict[str, Example]:
    """Return an example of every concept that a task's clients have in a split."""
    found = {}
    for client in run.clients():
        if client.task == task:
            examples = client_examples(run.config.data, client, split, seed=run.config.seed)
            rows = [examples[index] for index in range(len(examples))]
            found |= {concept_of(example.id): example for example in rows}
    return found


def main() -> None:
    """Run, and write what was found."""
    options = parser(__doc__).parse_args()
    options.out = options.out / "kept"  # not the comparison's, whose models are deleted
    rates = read_rates()
    for seed in SEEDS:
        write_federation(options.data, NAME, SAME_TASKS, split="test", seed=seed)

    def jobs(scenario: str, *methods: str) -> list[Job]:
        return [Job(scenario, s, m, own_rate(m, rates)) for m in methods for s in SEEDS]

    def opened(scenario: str, method: str) -> list[Run]:
        return [open_run(folder_of(job, options)) for job in jobs(scenario, method)]

    write_scores(run_all(jobs(NAME, *METHODS), options, keep=True), FOLDER / "why.csv.gz")
    run_all(jobs("tasks", PILOT, PER_TASK), options, keep=True)
    write_record(
        FOLDER / "why.json",
        {
            "swapped": [swapped(run) for run in opened(NAME, PER_TASK)],
            "remembered": {
                method: [remembered(run) for run in opened("tasks", method)]
                for method in (PILOT, PER_TASK)
            },
            "mixed": [mixed(run) for run in opened("tasks", PILOT)],
        },
        packages=PACKAGES,
    )


if __name__ == "__main__":
    main()
