"""How much GPU memory one client's training takes, from shapes alone.

Nothing is loaded and nothing is computed: the model is made of tensors without content, one
micro-batch runs through it, and what autograd keeps for the backward pass is added up. So the
figure follows the model, the stage, the LoRA and checkpointing as they are; what the
allocator and the kernels need on top is the allowance `RESERVE`.

What is sent and what is kept, tensor by tensor, known without loading the base model.

What a run will train, send and need, before anything is loaded.

Everything is counted on a model without weights, with the parameter table that training itself
uses (`pilot_flwr.algorithm.parameter_groups.GROUPS`), so that plan and run cannot differ.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pilot_flwr.algorithm.fedex_lora import largest_residual
from pilot_flwr.algorithm.parameter_groups import GROUPS, WHOLE, Sharing, set_trainable
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ModelError, TrainingError
from pilot_flwr.formatting import human_bytes
from pilot_flwr.model.architectures import Size, feature_size, spec_of
from pilot_flwr.model.base import empty_base, known_config, read_config
from pilot_flwr.model.pilot_model import PilotModel, lora_layers, share_inputs
from pilot_flwr.protocol import GroupName

RESERVE = 0.1
"""Share of the sum that is added for fragmentation and the kernels' own workspace."""

_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a weight in NF4 with double quantization: 4 bits, and scales for blocks of 64."""


@dataclass(frozen=True)
class MicroBatch:
    """Shape of what is trained on at a time.

    Attributes
    ----------
    examples : int
        Micro-batch size, one image each.
    rows, image_tokens : int
        Rows of an image, and the tokens that it takes.
    text_tokens, answer_tokens : int
        Tokens of an example besides its image's; those of them that carry a label.
    """

    examples: int
    rows: int
    image_tokens: int
    text_tokens: int = 128
    answer_tokens: int = 32


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the peak of one training step, by what they are for."""

    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reserve: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def largest_micro_batch(self, size: int, batch: MicroBatch) -> int:
        """Return how many examples fit into `size` bytes if `self` is what `batch` needs."""
        each = (self.activations + self.logits) / batch.examples
        fixed = self.base + self.adapters + self.gradients + self.optimizer
        return max(0, int((size / (1 + RESERVE) - fixed) / each))


def empty_model(
    config: ModelConfig, transformers_config: Any, *, tasks: tuple[str, ...], stage: int
) -> PilotModel:
    """Return a model of stage 1 or 2 without weights, on the meta device.

    Parameters
    ----------
    config : ModelConfig
        What to add to the base.
    transformers_config
        The base's configuration.
    tasks : tuple of str
        All T tasks; the first is the client's own.
    stage : int
        Architecture, 1 or 2.
    """
    base = empty_base(transformers_config).to(getattr(torch, config.dtype))
    with torch.device("meta"):
        model = PilotModel(base, config)
        model.enter_stage1(tasks[0])
        if stage == 2:
            model.enter_stage2(tasks, torch.Generator("cpu"))
    return model


def training_memory(model: PilotModel, batch: MicroBatch) -> Memory:
    """Estimate the peak of one training step in the model's stage.

    Parameters
    ----------
    model : PilotModel
        On the meta device, see `empty_model`. Its parameters are replaced; those that have
        gradients are trained.
    batch : MicroBatch
        What it is to be trained on.
    """
    groups = model.groups()
    trained = [p for named in groups.values() for p in named.values() if p.requires_grad]
    adapters = sum(p.nbytes for g, ps in groups.items() if g != "base" for p in ps.values())
    answers = batch.examples * batch.answer_tokens
    vocabulary = model.llava.lm_head.out_features
    parts = {
        "base": _base_bytes(model),
        "adapters": adapters,
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": 2 * sum(p.nbytes for p in trained),  # AdamW's two moments
        "activations": _activation_bytes(model, batch),
        # The logits in the model's precision and in float32, and the gradient of each.
        "logits": answers * vocabulary * 2 * (4 + getattr(torch, model.config.dtype).itemsize),
    }
    return Memory(**parts, reserve=int(RESERVE * sum(parts.values())))


def _base_bytes(model: PilotModel) -> int:
    parameters = list(model.groups()["base"].items())
    if model.config.quantization == "none":
        return sum(p.nbytes for _, p in parameters)
    quantized = {
        name: p.numel() * _NF4_BYTES
        for name, p in parameters
        if "language_model.layers" in name and p.ndim == 2
    }
    return int(sum(quantized.get(name, p.nbytes) for name, p in parameters))


def _activation_bytes(model: PilotModel, batch: MicroBatch) -> int:
    """Bytes that autograd keeps; with checkpointing, one layer's own are on top of the inputs."""
    with FakeTensorMode():
        _without_content(model)
        kept = _kept(model, batch)
        if not model.config.gradient_checkpointing:
            return kept
        decoder = model.llava.model.language_model
        decoder.activation_checkpointing_disable()
        return kept + (_kept(model, batch) - kept) // len(decoder.layers)


def _without_content(model: nn.Module) -> None:
    """Replace meta tensors by CPU tensors without content, so that autocast acts on them."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _kept(model: PilotModel, batch: MicroBatch) -> int:
    tokens, channels = feature_size(model.llava.config)
    language_model = model.llava.model.language_model
    dtype = getattr(torch, model.config.dtype)
    model.train()
    share_inputs(lora_layers(model), True)  # as under the autocast of a GPU
    with _saved(model) as kept, torch.autocast("cpu", torch.bfloat16):
        rows = torch.empty(batch.examples * batch.rows, tokens, channels)
        connected = model.connector(rows)
        width = connected.features.shape[-1]
        image = connected.features.to(dtype).reshape(batch.examples, -1, width)
        # What an architecture adds to its rows or takes from them when it packs them.
        packed = (0, 0, 0, batch.image_tokens - image.shape[1])
        image = nn.functional.pad(image, packed) if packed[-1] else image
        text = torch.empty(batch.examples, batch.text_tokens, width, dtype=dtype)
        hidden = language_model(inputs_embeds=torch.cat([image, text], 1), use_cache=False)
        model.llava.lm_head(hidden.last_hidden_state[:, -batch.answer_tokens :])
    return sum(kept.values())


@contextmanager
def _saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd keeps, without the parameters': address → bytes."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # an address must not be used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            alive.append(tensor)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        raise ModelError("An estimate of memory has no backward pass.")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


_KNOWN: dict[str, "Layout"] = {}


@dataclass(frozen=True)
class Layout:
    """Shapes of one client's parameters.

    Attributes
    ----------
    sent : dict
        Group → tensor → shape, of Θ_a and Θ_l; all of type `model.sent_dtype`.
    private_bytes : int
        Size of the private state after the last stage: ψ_s, T − 1 ψ_c, φ, and what is not shared.
    personal_bytes : int
        Size of a personal model of all that is sent or could be (`train.ditto`).
    """

    sent: dict[str, dict[str, list[int]]]
    private_bytes: int
    personal_bytes: int


def layout_of(
    config: ModelConfig, tasks: tuple[str, ...], sharing: Sharing = WHOLE, *, stages: int = 2
) -> Layout:
    """Return the shapes of a federation's parameters; half a second for a 7B model, once.

    Parameters
    ----------
    config : ModelConfig
        Base model, adapters and LoRA.
    tasks : tuple of str
        All T tasks.
    sharing : Sharing
        What is sent, and what is kept.
    stages : int
        `strategy.stages`: what is private is counted after the last of them.

    Raises
    ------
    ModelError
        The base model's configuration cannot be read.
    """
    key = f"{config}/{len(tasks)}/{sharing}/{stages}"
    if key not in _KNOWN:
        _KNOWN.clear()  # one run, one layout
        _KNOWN[key] = _layout(config, read_config(config), tasks, sharing, stages)
    return _KNOWN[key]


def _layout(
    config: ModelConfig,
    transformers_config: Any,
    tasks: tuple[str, ...],
    sharing: Sharing,
    stages: int,
) -> Layout:
    # In the last stage, as nothing is private or sent in stage 1 that is not there in stage 2.
    groups = empty_model(config, transformers_config, tasks=tasks, stage=stages).groups()
    width = getattr(torch, config.adapter_dtype).itemsize
    rows = [group for group, row in GROUPS.items() if row.sent]
    return Layout(
        sent={
            group: {n: list(p.shape) for n, p in groups[group].items() if sharing.sends(group, n)}
            for group in rows
        },
        private_bytes=width
        * sum(
            p.numel()
            for g, named in groups.items()
            for n, p in named.items()
            if sharing.keeps(g, n)
        ),
        personal_bytes=width * sum(p.numel() for group in rows for p in groups[group].values()),
    )


@dataclass(frozen=True)
class StagePlan:
    """One stage of one client.

    Attributes
    ----------
    parameters, trained_of, sent_of, kept_of : dict
        Group → number of its parameters: all; with gradients; uploaded; kept on the client.
    trained, sent, private, frozen : int
        Sums of parameters: with gradients; uploaded; kept on the client; not trained.
    up_bytes, down_bytes : int
        Tensors that one client sends and receives in one exchange.
    residual_bytes : list of int
        What of `down_bytes` is the residual of ``strategy.lora=exact``, at most: after each
        exchange, and in the plan as it is after the last.
    memory : Memory
        Peak of one training step.
    """

    parameters: dict[GroupName, int]
    trained_of: dict[GroupName, int]
    sent_of: dict[GroupName, int]
    kept_of: dict[GroupName, int]
    trained: int
    sent: int
    private: int
    frozen: int
    up_bytes: int
    down_bytes: int
    residual_bytes: list[int]
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What `pilot-flwr plan` shows.

    Attributes
    ----------
    path, architecture : str
        The base model.
    visual_tokens, vision_channels, text_channels : int
        N, D and C.
    batch : MicroBatch
        What the memory is for.
    stages : dict
        Stage → its plan, of the stages that the run has.
    total_bytes : int
        All tensors that travel in the run: all clients, all exchanges, both ways, and what the
        closing evaluation sends down.
    max_length : int
        `train.max_length`: an example with more tokens is refused.
    """

    path: str
    architecture: str
    visual_tokens: int
    vision_channels: int
    text_channels: int
    batch: MicroBatch
    stages: dict[int, StagePlan]
    total_bytes: int
    max_length: int

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
) -> Plan:
    """Count parameters and bytes, and estimate memory.

    Parameters
    ----------
    config : PilotConfig
        The run's configuration.
    image_size : tuple of int
        Height and width of an image in pixels, on which its tokens may depend.
    text_tokens, answer_tokens : int
        Length of an example besides its image, and the part of it that carries labels.
    micro_batch : int
        Instead of `train.batch_size`, if above zero.

    Raises
    ------
    ModelError
        The base model's configuration cannot be had, or its architecture is not supported.
    """
    base = known_config(config.model)
    spec = spec_of(base)
    batch = MicroBatch(
        micro_batch or config.train.batch_size,
        spec.count_rows(base, [image_size])[0],
        spec.count_tokens(base, [image_size])[0],
        text_tokens,
        answer_tokens,
    )
    last = config.strategy.stages
    stages = {stage: _stage(config, base, stage, batch) for stage in range(1, last + 1)}
    tokens, channels = feature_size(base)
    return Plan(
        path=config.model.path,
        architecture=spec.model_class,
        visual_tokens=tokens,
        vision_channels=channels,
        text_channels=base.text_config.hidden_size,
        batch=batch,
        stages=stages,
        total_bytes=_total_bytes(config, stages[1], stages[last]),
        max_length=config.train.max_length,
    )


def _total_bytes(config: PilotConfig, first: StagePlan, last: StagePlan) -> int:
    """Return the bytes of a whole run; a client that only evaluates sends nothing."""
    rounds, everyone = config.strategy.rounds, config.num_clients
    trainers = sum(config.strategy.trains(first=client == 0) for client in range(everyone))
    asked = everyone if config.evaluation.enabled else trainers
    closing = everyone * last.down_bytes if config.evaluation.enabled else 0
    up = trainers * (first.up_bytes + rounds * last.up_bytes)
    down = asked * (first.down_bytes + rounds * last.down_bytes) + closing
    # The residual grows from one exchange to the next, and there is none in the first.
    sizes = last.residual_bytes
    grown = asked * sum(sizes[:rounds]) + (everyone * sizes[rounds] if closing else 0)
    as_if_full = asked * (1 + rounds) + (everyone if closing else 0)
    return up + down - as_if_full * sizes[-1] + grown


def _stage(config: PilotConfig, base: object, stage: int, batch: MicroBatch) -> StagePlan:
    model = empty_model(config.model, base, tasks=tuple(config.data.tasks), stage=stage)
    sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
    set_trainable(model.groups(), stage=stage, sharing=sharing)
    residuals = _residual_bytes(config, model)
    width = getattr(torch, config.model.wire_dtype).itemsize
    numbers = _count(model, lambda group, name, parameter: True)
    trained = _count(model, lambda group, name, parameter: parameter.requires_grad)
    sent = _count(model, lambda group, name, parameter: sharing.sends(group, name))
    kept = _count(model, lambda group, name, parameter: sharing.keeps(group, name))
    if config.train.ditto.enabled:  # a second model of what is sent
        kept |= {g: kept[g] + numbers[g] for g, row in GROUPS.items() if row.sent}
    adapters = len(config.data.tasks) if stage == 2 else 1
    return StagePlan(
        parameters=numbers,
        trained_of=trained,
        sent_of=sent,
        kept_of=kept,
        trained=sum(trained.values()),
        sent=sum(sent.values()),
        private=sum(kept.values()),
        frozen=sum(numbers.values()) - sum(trained.values()),
        up_bytes=sum(sent.values()) * width,
        down_bytes=(sent["lora"] + adapters * sent["own_task_adapter"]) * width + residuals[-1],
        residual_bytes=residuals,
        memory=training_memory(model, batch),
    )


def _residual_bytes(config: PilotConfig, model: PilotModel) -> list[int]:
    """Return the most that exact aggregation leaves after each exchange, and put the last in."""
    exchanges = range(1, config.strategy.rounds + 2)
    if config.strategy.lora != "exact":
        return [0 for _ in exchanges]
    lora = model.groups()["lora"]
    terms = config.num_clients + 1
    residuals = [largest_residual(lora, terms=terms * n) for n in exchanges]
    with torch.device("meta"):
        model.set_residual(residuals[-1])
    return [sum(tensor.nbytes for tensor in residual.values()) for residual in residuals]


def _count(
    model: PilotModel, counts: Callable[[GroupName, str, nn.Parameter], bool]
) -> dict[GroupName, int]:
    return {
        group: sum(p.numel() for name, p in named.items() if counts(group, name, p))
        for group, named in model.groups().items()
    }


@contextmanager
def out_of_memory_explained(config: PilotConfig, stage: int) -> Iterator[None]:
    """Turn torch's out-of-memory error into one that says what to change.

    Raises
    ------
    TrainingError
        The device ran out of memory inside the block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(_advice(config, stage, str(error))) from error


def _advice(config: PilotConfig, stage: int, reason: str) -> str:
    remedies = []
    if config.train.batch_size > 1:
        remedies.append("lower `train.batch_size` and raise `train.accumulation_steps`")
    if config.evaluation.enabled and config.evaluation.batch_size > 1:
        remedies.append("lower `evaluation.batch_size` (if it happened in evaluation)")
    if not config.model.gradient_checkpointing:
        remedies.append("set `model.gradient_checkpointing=true`")
    if config.model.quantization == "none":
        remedies.append("set `model.quantization=4bit`")
    remedies.append("let fewer clients share the GPU (`simulation.client_gpus`)")
    memory = make_plan(config).stages[stage].memory
    parts = ", ".join(
        f"{name} {human_bytes(size)}"
        for name, size in asdict(memory).items()
        if name in ("base", "optimizer", "activations")
    )
    return (
        f"The device ran out of memory in stage {stage} with a micro-batch of "
        f"{config.train.batch_size}. The plan expects {human_bytes(memory.total)} for training "
        f"({parts}, …) on short examples with one image. To need less: {'; '.join(remedies)}. "
        f"`pilot-flwr plan` shows what each changes. Torch said: {reason.splitlines()[0]}"
    )
