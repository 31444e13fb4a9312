"""Benchmark a client's session on a warm base model against one that loads the base first.

Flower's LLM example loads the base in every session of every client; here a process loads it once
and a session only swaps adapters. Two clients alternate with CT-MoA sessions of one example and one
step, so that the cost apart from training shows. Measured on the shipped ``tiny-llava`` and on a
random checkpoint of 0.5 B parameters in Hugging Face format.

Run ``python benchmarks/client_session.py`` (about 2 minutes, 4 GiB, 1.1 GB of disk for a temporary
folder) to update ``benchmarks/results/client_session.json``, or ``--quick`` for a smoke test. The
reloaded base comes from the operating system's file cache, the best case.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, write_record
from _timing import summarize, take_turns
from random_base import HALF_BILLION, TINY, write_random_base
from transformers.utils import logging as transformers_logging

from pilot_flwr.algorithm.parameter_groups import WHOLE
from pilot_flwr.client.node import Site
from pilot_flwr.client.personalization import Received, extract_private_state, personalize
from pilot_flwr.client.session import run_session, session_generator
from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.config.train import TrainConfig
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.model.loading import initial_state, load_processor, loaded_model
from pilot_flwr.protocol import Instruction, SessionResult

RESULT = RESULTS / "client_session.json"


class Rotation:
    """Two clients whose sessions alternate on one base.

    Parameters
    ----------
    path : str
        The base model.
    folder : Path
        Holds the clients' private states.
    """

    def __init__(self, path: str, folder: Path) -> None:
        self.config = PilotConfig(
            model=ModelConfig(path=path),
            data=DataConfig(clients_per_task=1, train_examples=1, test_examples=1),
            train=TrainConfig(epochs=1),
        )
        self.initial = initial_state(self.config.model, seed=0)
        self.sites = [
            Site(client, folder / client.id, "cpu")
            for client in federation_clients(self.config.data)[:2]
        ]
        for site in self.sites:
            self._run(site, stage=1)
        self.next_site = itertools.cycle(self.sites)
        self.bases = itertools.count(2)
        self.training: list[float] = []

    def warm(self) -> None:
        """Run the next client's session on the loaded base."""
        result = self._run(next(self.next_site), stage=2)
        assert result.training is not None
        self.training.append(result.training.seconds)

    def cold(self) -> None:
        """Run the next client's session after loading the base.

        A process caches one base by its configuration, so a change of the feature cache's size
        limit, which nothing here reaches, makes `loaded_model` load it again.
        """
        cache = replace(self.config.model.feature_cache, max_gib=float(next(self.bases)))
        self.config = replace(self.config, model=replace(self.config.model, feature_cache=cache))
        self.warm()

    def swap_in(self) -> None:
        """Turn the base into the next client's CT-MoA model, and nothing else."""
        site = next(self.next_site)
        private, sent = site.private_store.load(), self._instruction(site, stage=2)
        received = Received(site.client.task, sent.tasks, sent.adapters, sent.lora)
        generator = session_generator(0, site.client.id, 2)
        personalize(self.base(), private, received, stage=2, generator=generator)

    def swap_out(self) -> None:
        """Read the trained parameters from the base, and nothing else."""
        model = self.base()
        model.state("own_task_adapter")
        model.state("lora")
        site = next(site for site in self.sites if site.client.task == model.own_task)
        site.private_store.save(extract_private_state(model, WHOLE), server_round=2)

    def base(self) -> Any:
        """Return the loaded base."""
        reduction = self.config.train.difference_loss.reduction
        return loaded_model(self.config.model, reduction=reduction, device=torch.device("cpu"))

    def _run(self, site: Site, *, stage: int) -> SessionResult:
        return run_session(site, self.config, self._instruction(site, stage), progress=print)

    def _instruction(self, site: Site, stage: int) -> Instruction:
        tasks = tuple(self.config.data.tasks)
        known = tasks if stage == 2 else (site.client.task,)
        adapters = dict.fromkeys(known, self.initial.adapter)
        return Instruction(stage, stage, tasks, adapters, self.initial.lora, evaluate=False)


def measure(path: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Time warm and cold sessions and the swaps alternately."""
    load_processor(path)
    rotation = Rotation(path, folder)
    parts = {
        "warm_turn": rotation.warm,
        "cold_turn": rotation.cold,
        "swap_in": rotation.swap_in,
        "swap_out": rotation.swap_out,
    }
    times = take_turns(parts, repeats=repeats)
    model = rotation.base()
    groups = {name: sum(p.numel() for p in g.values()) for name, g in model.groups().items()}
    return {
        "parameters": {
            "base": groups.pop("base") + sum(p.numel() for p in model.slot.projector.parameters()),
            "swapped": sum(groups.values()),
        },
        "training_seconds_in_a_turn": round(statistics.median(rotation.training), 4),
        **summarize(times, {"cold_to_warm": ("cold_turn", "warm_turn")}),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each part")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, write nothing")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    repeats = 1 if options.quick else options.repeats
    results: dict[str, Any] = {
        "threads": options.threads,
        "repeats": repeats,
        "examples_per_turn": 1,
        "steps_per_turn": 1,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = folder / "base"
        write_random_base(made, TINY if options.quick else HALF_BILLION)
        results["random"] = measure(str(made), folder / "random", repeats)
        results["random"]["file_bytes"] = sum(f.stat().st_size for f in made.glob("*.safetensors"))
        results["tiny-llava"] = measure("tiny-llava", folder / "tiny", repeats)
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(options.output, results, packages=["torch", "transformers", "peft"])
    return results


if __name__ == "__main__":
    main()
