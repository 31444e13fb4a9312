"""A run folder of many clients, whose events the real recorder writes."""

import time
from unittest.mock import patch

import numpy as np

from pilot_flwr.algorithm.aggregation import adaptive_weights
from pilot_flwr.algorithm.server_state import Aggregation
from pilot_flwr.config.loading import load_config, to_yaml
from pilot_flwr.flower.codec import encode_state
from pilot_flwr.protocol import EvaluationResult, Member, SessionResult, TrainingResult
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import AggregationMethod
from pilot_flwr.server.event_recorder import EventRecorder

TASKS = ("vqa", "counting", "captioning")


def members(count):
    """Clients of three tasks, alternately."""
    return [Member(f"{TASKS[k % 3]}-{k // 3}", TASKS[k % 3], 90 + k % 7, 1) for k in range(count)]


def aggregation(drawn, rng, neighbours=3):
    """LoRAs in two groups per task, so that clustering has something to find."""
    drawn = sorted(drawn, key=lambda member: member.client)
    centres = rng.standard_normal((len(TASKS), 2, 8)) * 4
    group = rng.integers(0, 2, len(drawn))
    points = rng.standard_normal((len(drawn), 8))
    points += centres[[TASKS.index(m.task) for m in drawn], group]
    squares = (points**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
    np.fill_diagonal(distances, 0)
    distances = (distances + distances.T) / 2
    weights = adaptive_weights(distances, [m.examples for m in drawn], neighbours)
    names = [m.client for m in drawn]
    tasks = {t: [m.client for m in drawn if m.task == t] for t in TASKS}
    return Aggregation(names, {t: c for t, c in tasks.items() if c}, weights, distances)


def write_run(folder, *, clients, rounds=2, share=1.0, failing=0, listener=None, seed=0):
    """Write the folder of a run; a `share` of the clients takes part in each exchange.

    The first `failing` of them fail in every exchange. An exchange lasts 100 s by the events.
    """
    overrides = f"data.clients_per_task={clients // 3} strategy.rounds={rounds}"
    config = load_config(f"experiment=demo {overrides} run.folder={folder}")
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.write("config.yaml", to_yaml(config))
    if listener:
        run.listener = listener
    method = AggregationMethod.of(config.strategy)
    recorder = EventRecorder(run, num_exchanges=rounds + 1, tasks=TASKS, method=method)
    rng, everyone, began = np.random.default_rng(seed), members(clients), time.time()
    sent = {"lora": encode_state({}), "task_adapters": encode_state({})}
    sizes = {"lora": 239_000, "task_adapters": 62_700}
    clock = [began]

    def result(member, exchange, training=True):
        score = float(np.clip(0.3 + 0.1 * exchange + 0.15 * rng.standard_normal(), 0, 1))
        seconds = float(rng.lognormal(1.0, 0.4))
        trained = TrainingResult(
            losses={"total": 1 / (1 + exchange) + 0.1 * float(rng.random()), "ce": 0.1},
            examples=member.examples, steps=6, seconds=seconds,
            gradients={"lora": 58_368, "own_task_adapter": 15_552},
        )  # fmt: skip
        evaluation = EvaluationResult(score, "exact_match", 20, 0.5)
        return SessionResult(
            training=trained if training else None,
            evaluation=evaluation,
            started=clock[0],
            seconds=seconds + 0.6,
        )

    with (
        patch("pilot_flwr.server.event_recorder.num_bytes", lambda content: sizes),
        patch("pilot_flwr.run.directory.time.time", lambda: clock[0]),
    ):
        for exchange in range(1, rounds + 2):
            picked = rng.choice(clients, max(1, round(share * clients)), replace=False)
            drawn = [everyone[k] for k in sorted(picked)]
            start = clock[0]
            recorder.begin()
            stages = {m.client: min(exchange, 2) for m in drawn}
            available = {task: clients // 3 for task in TASKS} if share < 1 else None
            recorder.roster(exchange, drawn, stages, available)
            for m in drawn:
                recorder.instruction(exchange, "train", m, stages[m.client], sent, asked=len(drawn))
            for place, m in enumerate(drawn):
                clock[0] = start + 100 * (place + 1) / len(drawn)
                if place < failing:
                    recorder.failure(exchange, "train", m.client, "No reply within 100 s.")
                    continue
                found = result(m, exchange)
                recorder.evaluation(exchange - 1, m, found.evaluation)
                recorder.training(exchange, m, stages[m.client], found, sent)
            recorder.aggregation(exchange, aggregation(drawn[failing:], rng), 1.5)
            recorder.close(exchange, 101.0)
        for m in drawn:
            recorder.instruction(rounds + 2, "evaluate", m, 2, sent, asked=len(drawn))
        for m in drawn:
            recorder.evaluation(rounds + 1, m, result(m, rounds + 1, False).evaluation)
        recorder.close_evaluation(rounds + 1, 12.0)
        run.finish(error=None)
    return folder
