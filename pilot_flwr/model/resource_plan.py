"""Plan a run from shapes alone: parameters, traffic, storage and GPU memory.

Nothing is loaded. Training uses the same parameter groups
(`pilot_flwr.algorithm.parameter_groups.GROUPS`), so plan and run cannot differ.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from pilot_flwr.algorithm.fedex_lora import largest_residual
from pilot_flwr.algorithm.parameter_groups import PERSONAL_GROUPS, Sharing, decoder_matrix
from pilot_flwr.algorithm.quantization import compressed_bytes
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import TrainingError
from pilot_flwr.formatting import human_bytes
from pilot_flwr.model.architectures import decoder_of, remembered
from pilot_flwr.model.memory import RESERVE, Memory, MicroBatch, Stage, training_memory
from pilot_flwr.model.processor import Size, planned_image
from pilot_flwr.model.shapes import DTYPE_BYTES, group_shapes, numel
from pilot_flwr.protocol import GroupName
from pilot_flwr.run.checkpoint import KEPT_ROUNDS


@dataclass(frozen=True)
class StagePlan:
    """One stage of one client. Numbers count parameters; `..._of` count them by group."""

    parameters: dict[GroupName, int]
    trained_of: dict[GroupName, int]
    sent_of: dict[GroupName, int]
    kept_of: dict[GroupName, int]
    trained: int
    sent: int
    private: int
    frozen: int
    up_bytes: int
    """Tensors that one client sends in one exchange."""
    down_bytes: int
    """Tensors that it receives, with the largest residual."""
    residual_bytes: list[int]
    """Upper bound of the residual of ``strategy.lora=exact``, after each exchange."""
    memory: Memory
    """Peak of one training step."""
    moments_bytes: int
    """AdamW's moments in the client's private state: 0 unless `train.schedule=run`."""
    error_bytes: int
    """Errors of compressed uploads there: 0 unless `model.sent_dtype` compresses them."""


@dataclass(frozen=True)
class ServerPlan:
    """Costs of one exchange at the server, with all clients in the last stage."""

    clients: int
    """Clients that the server instructs."""
    up_bytes: int
    down_bytes: int
    disk_bytes: int
    """Upper bound of tensors in the run folder, on a file system with hard links: an exchange's
    uploads until they are aggregated, with clipped copies and the server optimizer's mixtures; and
    `pilot_flwr.run.checkpoint.KEPT_ROUNDS` checkpoints beside the next one, with moments and
    residual."""


@dataclass(frozen=True)
class Plan:
    """The figures that `pilot-flwr plan` prints."""

    path: str
    architecture: str
    text_channels: int
    lora_layers: list[str]
    """Linear layers of a decoder layer that have a LoRA, such as ``self_attn.q_proj``."""
    other_layers: list[str]
    """Linear layers of a decoder layer that have none."""
    batch: MicroBatch
    """The micro-batch of the memory estimate."""
    stages: dict[int, StagePlan]
    server: tuple[ServerPlan, ...]
    """For the clients that an exchange draws; if these are not all, also for all clients."""
    total_bytes: int
    """Tensors of the whole run, in both directions, with the closing evaluation; an upper bound if
    clients are drawn: the first exchange of a client takes less."""
    max_length: int
    """`train.max_length`: `train.over_long` decides on longer examples."""

    @property
    def tokens(self) -> int:
        """Tokens of one example."""
        return self.batch.image_tokens + self.batch.text_tokens


def make_plan(
    config: PilotConfig,
    *,
    image_size: Size = (480, 640),
    text_tokens: int = 128,
    answer_tokens: int = 32,
    micro_batch: int = 0,
    lora_rank: int = 0,
) -> Plan:
    """Count parameters and bytes, and estimate memory.

    The stages are those of a client of `lora_rank`, or 0 for the run's rank; server and run are
    planned for clients of the run's rank.
    """
    decoder = decoder_of(config.model)
    features, tokens = remembered(
        "image", config.model, image_size, lambda: planned_image(config.model, image_size)
    )
    batch = MicroBatch(
        micro_batch or config.train.batch_size, tuple(features), tokens, text_tokens, answer_tokens
    )
    last = config.strategy.stages
    drawn = config.strategy.num_drawn(config.num_clients, train=True)
    stages = {stage: _stage_plan(config, stage, batch) for stage in range(1, last + 1)}
    client = stages
    adapted, others = _linear_layers(config)
    if lora_rank:
        lora = replace(config.model.lora, rank=lora_rank, client_ranks={})
        smaller = replace(config, model=replace(config.model, lora=lora))
        client = {stage: _stage_plan(smaller, stage, batch) for stage in stages}
    return Plan(
        path=config.model.path,
        architecture=decoder.family,
        text_channels=decoder.width,
        lora_layers=adapted,
        other_layers=others,
        batch=batch,
        stages=client,
        server=tuple(
            _server_plan(config, stages[last], clients)
            for clients in sorted({drawn, config.num_clients})
        ),
        total_bytes=_total_bytes(config, stages[1], stages[last]),
        max_length=config.train.max_length,
    )


def _linear_layers(config: PilotConfig) -> tuple[list[str], list[str]]:
    """Return the linear layers of the decoder's layers with a LoRA, and those without."""
    shapes = group_shapes(config.model, tasks=tuple(config.data.tasks), stage=1)
    found = (decoder_matrix(name, shape) for name, shape in shapes["base"].items())
    linear = list(dict.fromkeys(filter(None, found)))
    targets = tuple(f".{target}" for target in config.model.lora.targets)
    adapted = [name for name in linear if f".{name}".endswith(targets)]
    return adapted, [name for name in linear if name not in adapted]


def _trainers(config: PilotConfig, clients: int) -> int:
    return sum(config.strategy.trains(first=client == 0) for client in range(clients))


def _server_plan(config: PilotConfig, stage: StagePlan, clients: int) -> ServerPlan:
    trainers = _trainers(config, clients)
    receivers = clients if config.evaluation.enabled else trainers
    return ServerPlan(
        clients=receivers,
        up_bytes=trainers * stage.up_bytes,
        down_bytes=receivers * stage.down_bytes,
        disk_bytes=_disk_bytes(config, stage, trainers),
    )


def _disk_bytes(config: PilotConfig, stage: StagePlan, trainers: int) -> int:
    strategy, width = config.strategy, DTYPE_BYTES[config.model.wire_dtype]
    lora, adapter = stage.sent_of["lora"], stage.sent_of["own_task_adapter"]
    tasks, versions = len(config.data.tasks), 1 + KEPT_ROUNDS
    # LoRAs that an exchange replaces, and those that there are in the end.
    ranks = len({config.model.lora.rank, *config.model.lora.client_ranks.values()})
    new = {"adaptive": trainers, "task": tasks * ranks}.get(strategy.lora, ranks)
    kept = new
    if strategy.lora == "adaptive":
        kept = min(_trainers(config, config.num_clients), new * (strategy.rounds + 1))
    loras, adapters = trainers + kept + KEPT_ROUNDS * new, trainers + versions * tasks
    if strategy.update_norm.action == "clip":  # the norms of at most half exceed the median
        loras, adapters = loras + trainers // 2, adapters + trainers // 2
    moments = 0
    if strategy.server_optimizer.name != "none":
        # Mixtures, and LoRAs mapped beside their files in checkpoints: the new ones and all others.
        loras += 2 * new + kept
        # Checkpoints write all moments anew; the server maps one more version, of one LoRA two.
        moments = (versions + 1) * (kept * lora + tasks * adapter) + lora
    numbers = loras * lora + adapters * adapter
    residuals = (versions + 1) * stage.residual_bytes[-1]  # one may be mapped after a resume
    return numbers * width + 2 * DTYPE_BYTES["float32"] * moments + residuals


def _total_bytes(config: PilotConfig, first: StagePlan, last: StagePlan) -> int:
    """Return the bytes of a whole run; clients that only evaluate send nothing."""
    rounds, strategy = config.strategy.rounds, config.strategy
    clients = strategy.num_drawn(config.num_clients, train=True)
    trainers = _trainers(config, clients)
    receivers, closing = trainers, 0
    if config.evaluation.enabled:
        receivers, closing = clients, strategy.num_drawn(config.num_clients, train=False)
    residual = last.residual_bytes[-1]
    up = trainers * (first.up_bytes + rounds * last.up_bytes)
    down = receivers * (first.down_bytes + rounds * last.down_bytes - (1 + rounds) * residual)
    down += closing * (last.down_bytes - residual)
    # The first exchange has no residual; then it grows with each.
    growing = last.residual_bytes
    return up + down + receivers * sum(growing[:rounds]) + closing * growing[rounds]


def _stage_plan(config: PilotConfig, number: int, batch: MicroBatch) -> StagePlan:
    sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
    stage = Stage(config.model, tuple(config.data.tasks), number, sharing)
    residuals = _residual_bytes(config, stage)
    width = DTYPE_BYTES[config.model.wire_dtype]
    numbers = stage.count(lambda group, name: True)
    trained, sent = stage.count(stage.trains), stage.count(sharing.sends)
    kept = stage.count(sharing.keeps)
    personal = PERSONAL_GROUPS[config.train.personal.model]
    kept |= {group: kept[group] + numbers[group] for group in personal}
    adapters = len(config.data.tasks) if number == 2 else 1
    return StagePlan(
        parameters=numbers,
        trained_of=trained,
        sent_of=sent,
        kept_of=kept,
        trained=sum(trained.values()),
        sent=sum(sent.values()),
        private=sum(kept.values()),
        frozen=sum(numbers.values()) - sum(trained.values()),
        up_bytes=_up_bytes(stage, sharing),
        down_bytes=(sent["lora"] + adapters * sent["own_task_adapter"]) * width + residuals[-1],
        residual_bytes=residuals,
        memory=_memory(config, stage, batch),
        moments_bytes=(config.train.schedule == "run")
        * (2 * DTYPE_BYTES[config.model.adapter_dtype] * sum(trained.values())),
        error_bytes=sum(sent.values()) * width if config.model.upload_bits else 0,
    )


def _memory(config: PilotConfig, stage: Stage, batch: MicroBatch) -> Memory:
    """Estimate the peak of a training step, of the shared model or of a personal LoRA beside it."""
    memory, personal = training_memory(stage, batch), config.train.personal
    if personal.model != "beside":
        return memory
    sharing = replace(stage.sharing, trained_adapter=personal.mutual)
    beside = replace(stage, sharing=sharing)
    beside.groups["residual"] = beside.groups["lora"]  # the received LoRA, frozen
    found = training_memory(beside, batch)
    if personal.mutual:  # the personal model's tensors and moments besides the shared one's
        lora, adapter = (numel(stage.groups[group]) for group in ("lora", "own_task_adapter"))
        width = DTYPE_BYTES[config.model.adapter_dtype]
        # Both models' logits of the step's micro-batches, and four more float32 copies of one's.
        step = 2 * config.train.accumulation_steps * DTYPE_BYTES[config.model.dtype]
        vocabulary = decoder_of(config.model).vocabulary
        logits = batch.examples * batch.answer_tokens * vocabulary * (step + 4 * 4)
        found = replace(
            found,
            adapters=found.adapters + width * (lora + adapter),
            optimizer=found.optimizer + 2 * width * lora,
            logits=found.logits + logits,
            reserve=found.reserve + int(RESERVE * (width * (3 * lora + adapter) + logits)),
        )
    return max(memory, found, key=lambda estimate: estimate.total)


def _up_bytes(stage: Stage, sharing: Sharing) -> int:
    """Return the bytes of one upload, compressed or not."""
    bits, width = stage.config.upload_bits, DTYPE_BYTES[stage.config.wire_dtype]
    return sum(
        compressed_bytes(shape, bits) if bits else width * math.prod(shape)
        for group, shapes in stage.groups.items()
        for name, shape in shapes.items()
        if sharing.sends(group, name)
    )


def _residual_bytes(config: PilotConfig, stage: Stage) -> list[int]:
    """Bound the residual's size after each exchange; `stage` gets the shapes of the last one."""
    exchanges = range(1, config.strategy.rounds + 2)
    if config.strategy.lora != "exact":
        return [0 for _ in exchanges]
    lora, terms = stage.groups["lora"], config.num_clients + 1
    residuals = [largest_residual(lora, terms=terms * n) for n in exchanges]
    stage.groups["residual"] = residuals[-1]
    return [DTYPE_BYTES["float32"] * numel(residual) for residual in residuals]


@contextmanager
def out_of_memory_explained(config: PilotConfig, stage: int) -> Iterator[None]:
    """Turn torch's out-of-memory error into one that proposes changes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(_advice(config, stage, str(error))) from error


def _advice(config: PilotConfig, stage: int, reason: str) -> str:
    batch_size, evaluation = config.train.batch_size, config.evaluation
    remedies = {
        "lower `train.batch_size` and raise `train.accumulation_steps`": batch_size > 1,
        "lower `evaluation.batch_size` (if it happened in evaluation)": evaluation.enabled
        and evaluation.batch_size > 1,
        "set `model.gradient_checkpointing=true`": not config.model.gradient_checkpointing,
        "set `model.quantization=4bit`": config.model.quantization == "none",
        "let fewer clients share the GPU (`simulation.client_gpus`)": True,
    }
    memory = make_plan(config).stages[stage].memory
    parts = ", ".join(
        f"{name} {human_bytes(getattr(memory, name))}"
        for name in ("base", "optimizer", "activations")
    )
    return (
        f"The device ran out of memory in stage {stage} with a micro-batch of "
        f"{batch_size}. The plan expects {human_bytes(memory.total)} for training "
        f"({parts}, …) on short examples with one image. To need less: "
        f"{'; '.join(remedy for remedy, helps in remedies.items() if helps)}. "
        f"`pilot-flwr plan` shows the effect of each. Torch reported: {reason.splitlines()[0]}"
    )
