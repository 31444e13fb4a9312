"""Compute another rank's share of a training or evaluation (`pilot_flwr.client.parallel`).

The rank's base model stays in its process. Each `Part` describes the adapters to add; rank 0, which
alone has the private state and the server's message, broadcasts their values.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from pilot_flwr.client.client_data import ClientData, open_client_data
from pilot_flwr.client.evaluation import answer, represent_instances
from pilot_flwr.client.mutual import Teacher
from pilot_flwr.client.node import Site, find_device
from pilot_flwr.client.optimizer import RunSchedule
from pilot_flwr.client.parallel import Ranks
from pilot_flwr.client.training import Proximal, train
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.config.train import TrainConfig
from pilot_flwr.data.client_files import Split
from pilot_flwr.errors import StateError
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.resource_plan import out_of_memory_explained
from pilot_flwr.protocol import TrainingResult


@dataclass(frozen=True)
class Part:
    """One training or evaluation, for the client's other processes.

    `tasks` has the client's own first; `residual` the shapes of the frozen LoRA beside Θ_l; `share`
    is `PilotModel.share`; `examples` is the size of the split; `train` is None in evaluation;
    `generator` is the state of the training's generator; `schedule` has no moments, which rank 0
    broadcasts; with `together`, so are the tensors of a `Teacher`.
    """

    site: Site
    config: PilotConfig
    tasks: tuple[str, ...]
    stage: int
    lora_rank: int
    residual: dict[str, tuple[int, ...]]
    share: float | None
    split: Split
    examples: int
    train: TrainConfig | None
    generator: bytes
    schedule: RunSchedule | None
    together: bool


def adapters(model: PilotModel) -> list[torch.Tensor]:
    """Return all parameters except the frozen base, which every rank loads itself."""
    groups = model.groups()
    return [p for group, named in groups.items() if group != "base" for p in named.values()]


def take_part(ranks: Ranks, part: Part) -> None:
    """Compute another rank's share of one training or evaluation."""
    config = part.config
    with out_of_memory_explained(config, part.stage):
        device = find_device(part.site.device, rank=ranks.rank)
        data = open_client_data(part.site, config, device, lambda line: None)
        model = data.model
        model.enter_stage1(part.tasks[0])
        if part.stage == 2:
            model.enter_stage2(part.tasks, torch.Generator())
        model.set_lora_rank(part.lora_rank)
        residual = {name: torch.zeros(shape) for name, shape in part.residual.items()}
        model.set_residual(residual, share=part.share)
        ranks.spread(adapters(model))
        examples = data.examples(part.split)
        if len(examples) != part.examples:
            raise StateError(
                f"The {part.split} split of client {part.site.client.id!r} had {part.examples} "
                f"examples, then {len(examples)}: its data changed during the session."
            )
        if part.train is None:
            how: dict[str, Any] = {
                "collator": data.collator,
                "encode": data.encoder(part.split),
                "config": config.evaluation,
                "autocast_choice": config.train.autocast,
            }
            known = represent_instances(model, data.instances(), **how)
            answer(model, examples, **how, known=known, ranks=ranks)
            return
        schedule = part.schedule
        if schedule is not None:
            schedule = replace(schedule, moments=ranks.spread_state({}))
        teacher = None
        if part.together:
            teacher = Teacher(model, config.train.personal, model.state("lora"))
            ranks.spread(list(teacher.tensors.values()))
        generator = torch.Generator()
        generator.set_state(torch.tensor(list(part.generator), dtype=torch.uint8))
        train_client(ranks, data, part.train, generator, run_schedule=schedule, teacher=teacher)


def train_client(
    ranks: Ranks,
    data: ClientData,
    config: TrainConfig,
    generator: torch.Generator,
    *,
    proximal: Proximal | None = None,
    run_schedule: RunSchedule | None = None,
    teacher: Teacher | None = None,
) -> TrainingResult:
    """Train the loaded model on the client's training split; return its result."""
    result = train(
        data.model,
        data.examples("train"),
        collator=data.collator,
        encode=data.encoder("train"),
        config=config,
        generator=generator,
        progress=data.progress,
        proximal=proximal,
        run_schedule=run_schedule,
        teacher=teacher,
        ranks=ranks,
    )
    cut = data.collator.cut_examples
    cut.update(*ranks.collect(sorted(cut)))
    return result
