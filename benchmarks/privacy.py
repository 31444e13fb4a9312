"""Measure what client-level differential privacy costs the demo: scores against ε.

The demo's federation (nine clients, three tasks, four exchanges) runs in this process with
a run's own code, `run_session` and `ServerState`: once without privacy, then with clipped and noisy
uploads, from almost no noise to enough for a small ε. Clients evaluate here
(`privacy.send_metrics=true`), because the demo's data is public. Noise cannot be repeated: with
several `SEEDS`, the range over them shows how much of a score is chance.

Run ``python benchmarks/privacy.py`` (about 10 minutes) to update
``benchmarks/results/privacy.json``, or ``--quick`` for a smoke test.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _record import RESULTS, write_record

from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.client.node import Site
from pilot_flwr.client.privacy import change_norm
from pilot_flwr.client.privacy_accountant import epsilon
from pilot_flwr.client.session import run_session
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import PilotConfig, PrivacyConfig
from pilot_flwr.data.federation import Client, federation_clients
from pilot_flwr.model.loading import initial_state
from pilot_flwr.protocol import Instruction, Member, SessionResult, Update

RESULT = RESULTS / "privacy.json"
CLIP_NORM = 1.0
NOISE_MULTIPLIERS = (1e-3, 1e-2, 1.0)
SEEDS = (0,)
QUICK = (
    "data.tasks=[vqa,counting] data.clients_per_task=1 data.train_examples=8 data.test_examples=2 "
    "train.epochs=1 train.batch_size=4 strategy.rounds=1 evaluation.max_new_tokens=2"
)


class DemoFederation:
    """The demo's clients and server in this process.

    Parameters
    ----------
    config : PilotConfig
        The run's.
    folder : Path
        Gets the clients' private states and accounts.
    """

    def __init__(self, config: PilotConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.clients = federation_clients(config.data)
        initial = initial_state(config.model, seed=config.seed)
        self.state = ServerState(tuple(config.data.tasks), initial)
        self.change_norms: list[float] = []

    def run(self) -> dict[str, float]:
        """Run all exchanges; return the score of every client's last model."""
        for number in range(1, self.config.strategy.rounds + 2):
            turns = {c: self._turn(c, number, train=True) for c in self.clients}
            updates = [self._update(c, number, result) for c, result in turns.items()]
            self.state.aggregate(updates, self.config.strategy)
        last = self.config.strategy.rounds + 2
        turns = {c: self._turn(c, last, train=False) for c in self.clients}
        return {c.id: r.evaluation.score for c, r in turns.items() if r.evaluation is not None}

    def _turn(self, client: Client, number: int, *, train: bool) -> SessionResult:
        site = Site(client, self.folder / client.id, "cpu", run="benchmark")
        stage = site.private_store.stage(before=number)
        stage = self.state.stage_for(Member(client.id, client.task, 1, stage)) if train else 2
        tasks = self.state.tasks if stage == 2 else (client.task,)
        order = Instruction(
            server_round=number,
            stage=stage,
            tasks=self.state.tasks,
            adapters={task: self.state.adapters[task] for task in tasks},
            lora=self.state.lora_for(client.id, client.task),
            train=train,
            evaluate=not train,
        )
        result = run_session(site, self.config, order, progress=lambda line: None)
        if train:
            sent = {"adapter": order.adapters[client.task], "lora": order.lora}
            got = {"adapter": result.adapter, "lora": result.lora}
            self.change_norms.append(change_norm(got, sent))
        return result

    def _update(self, client: Client, number: int, result: SessionResult) -> Update:
        assert result.training is not None
        return Update(
            client.id, client.task, number, result.training.examples, result.adapter, result.lora
        )


def measure(config: PilotConfig, privacy: PrivacyConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Run the demo with every seed; return mean scores per task, their mean, and ε."""
    per_task: dict[str, list[float]] = {task: [] for task in config.data.tasks}
    norms: list[float] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            run = replace(config, seed=seed, privacy=privacy)
            federation = DemoFederation(run, Path(name) / "clients")
            scores = federation.run()
            norms += federation.change_norms
        for task, values in per_task.items():
            mine = [scores[c.id] for c in federation_clients(config.data) if c.task == task]
            values.append(statistics.mean(mine))
    means = [statistics.mean(values) for values in zip(*per_task.values(), strict=True)]
    exchanges = config.strategy.rounds + 1
    spent = epsilon([privacy.noise_multiplier] * exchanges, privacy.delta)
    return {
        "noise_multiplier": privacy.noise_multiplier if privacy.enabled else None,
        "epsilon_after_all_exchanges": round(spent, 2) if privacy.enabled else None,
        "score_per_task": {t: round(statistics.mean(v), 4) for t, v in per_task.items()},
        "score_mean_over_tasks": round(statistics.mean(means), 4),
        "score_range_over_seeds": [round(min(means), 4), round(max(means), 4)],
        "upload_change_norm_median": round(statistics.median(norms), 4),
    }


def untrained(config: PilotConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the scores of the base model, at ε = 0."""
    per_task: dict[str, list[float]] = {task: [] for task in config.data.tasks}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            federation = DemoFederation(replace(config, seed=seed), Path(name) / "clients")
            for client in federation.clients:
                result = federation._turn(client, 1, train=False)
                assert result.evaluation is not None
                per_task[client.task].append(result.evaluation.score)
    means = {task: statistics.mean(values) for task, values in per_task.items()}
    return {
        "score_per_task": {task: round(mean, 4) for task, mean in means.items()},
        "score_mean_over_tasks": round(statistics.mean(means.values()), 4),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny demo, write nothing")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    config = load_config(QUICK if options.quick else "experiment=demo")
    seeds = SEEDS[:1] if options.quick else SEEDS
    multipliers = (8.0,) if options.quick else NOISE_MULTIPLIERS
    settings = [PrivacyConfig()]
    settings += [
        PrivacyConfig(enabled=True, clip_norm=CLIP_NORM, noise_multiplier=z, send_metrics=True)
        for z in multipliers
    ]
    state = initial_state(config.model, seed=0)
    sent = sum(t.numel() for group in (state.adapter, state.lora) for t in group.values())
    results: dict[str, Any] = {
        "run": {
            "clients": config.num_clients,
            "exchanges": config.strategy.rounds + 1,
            "seeds": list(seeds),
            "parameters_uploaded": sent,
        },
        "clip_norm": CLIP_NORM,
        "delta": settings[0].delta,
        "untrained": untrained(config, seeds),
        "settings": [],
    }
    for privacy in settings:
        results["settings"].append(measure(config, privacy, seeds))
        print(json.dumps(results["settings"][-1]), flush=True)
    if not options.quick:
        write_record(options.output, results, packages=["dp-accounting", "torch"])
    return results


if __name__ == "__main__":
    main()
