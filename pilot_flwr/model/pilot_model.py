"""The base model with Pilot's adapters, and the switch from stage 1 to stage 2.

`PilotModel` is a frozen vision-language model of Hugging Face with a peft LoRA (Θ_l, the text
adapter) in its language model and a Pilot connector in place of its projector. Everything else is
the base model's own forward pass. One base serves all clients of a process: each session swaps
adapters in and out, and the base is never loaded again.

Features of the vision tower are computed once (`PilotModel.encode_images`). Then its layers, or all
of a convolutional tower, are skipped, and the connector reads the kept features instead.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pilot_flwr.algorithm.arrays import layout_difference
from pilot_flwr.algorithm.connector import (
    ConnectorOutput,
    CrossTaskMoA,
    TaskClientConnector,
    copied,
    stage1_connector,
    stage2_connector,
)
from pilot_flwr.algorithm.parameter_groups import Groups, group_parameters, set_trainable
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.data.collator import IGNORE_INDEX, Batch
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import (
    merge_of,
    missing_package_explained,
    spec_of,
    token_channels,
)
from pilot_flwr.model.lora import add_lora, scale_loras, set_residual
from pilot_flwr.model.processor import PIXELS, Inputs, stand_in
from pilot_flwr.model.slot import Slot, Visual, no_features, replaced, unchanged, zero_patches
from pilot_flwr.protocol import GroupName, State


def empty_base(config: Any) -> Any:
    """Build the base model of a configuration on the meta device."""
    spec_of(config)
    with missing_package_explained(), torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def empty_model(
    config: ModelConfig, base: Any, *, tasks: tuple[str, ...], stage: int
) -> "PilotModel":
    """Build a model of a stage on the meta device; `tasks[0]` is the client's own task."""
    empty = empty_base(base).to(getattr(torch, config.dtype))
    with torch.device("meta"):
        model = PilotModel(empty, config)
        model.enter_stage1(tasks[0])
        if stage == 2:
            model.enter_stage2(tasks, torch.Generator("cpu"))
    return model


class ModelOutput(NamedTuple):
    """Logits (M, V) and labels (M,) of a batch's M answer tokens, and the connector's output."""

    logits: Tensor
    labels: Tensor
    connector: ConnectorOutput


class PilotModel(nn.Module):
    """A frozen base model with Θ_l and a connector; `base` is changed in place.

    `reduction` is that of L_d, `balance_reduction` that of L_b.
    """

    def __init__(
        self,
        base: Any,
        config: ModelConfig,
        *,
        reduction: str = "normalized",
        balance_reduction: str = "pooled",
    ) -> None:
        super().__init__()
        self.config = config
        self.reduction, self.balance_reduction = reduction, balance_reduction
        self.spec = spec_of(base.config)
        dtype = getattr(torch, config.adapter_dtype)
        base.requires_grad_(False)
        self.base = base
        self.tower.eval()
        add_lora(self.decoder, config.lora, dtype=dtype)
        if config.gradient_checkpointing:
            self.decoder.activation_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            for layer in self.decoder.layers:
                layer.compile(dynamic=True)
        self.own_task = ""  # the task of the client whose session it is
        self.share: float | None = None  # of a personal LoRA beside the received one
        self._groups: Groups | None = None
        self._lora_layers = [m for m in base.modules() if isinstance(m, LoraLayer)]
        projector = base.model.get_submodule(self.spec.projector)
        self.slot = Slot(copied(projector).to(self.device, dtype))
        base.model.set_submodule(self.spec.projector, self.slot)

    @property
    def connector(self) -> TaskClientConnector | CrossTaskMoA:
        """The connector in place of the projector."""
        assert self.slot.pilot is not None
        return self.slot.pilot

    @property
    def decoder(self) -> Any:
        """The language model, without its head."""
        return self.base.model.get_decoder()

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        tower: nn.Module = self.base.model.get_submodule(self.spec.tower)
        return tower

    @property
    def device(self) -> torch.device:
        """Device of inputs, adapters, outputs and losses; layers of the base may be on others."""
        device: torch.device = self.base.device
        return device

    @property
    def stage(self) -> int:
        """1 or 2, by the connector in place."""
        return 2 if isinstance(self.connector, CrossTaskMoA) else 1

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but the vision tower: it is frozen and stays in evaluation."""
        super().train(mode)
        self.tower.eval()
        return self

    def enter_stage1(self, own_task: str, *, initialisation: str | None = None) -> None:
        """Start a client's session with a new stage-1 connector from the pretrained projector.

        `initialisation` overrides the configured one; with ``identity`` the model equals the base
        model until parameters are loaded or trained.
        """
        self.own_task = own_task
        config = replace(self.config, initialisation=initialisation or self.config.initialisation)
        self._place(
            stage1_connector(
                self.slot.projector, config, last=self.spec.last, reduction=self.reduction
            )
        )

    def enter_stage2(self, tasks: Sequence[str], generator: torch.Generator) -> None:
        """Replace the stage-1 connector by CT-MoA of all `tasks`: keep ψ_s, create ψ_c and φ."""
        stage1 = self.connector
        if not isinstance(stage1, TaskClientConnector):
            raise ModelError("Stage 2 can only be entered from stage 1.")
        if self.own_task not in tasks:
            raise ModelError(f"The own task {self.own_task!r} is not among {list(tasks)}.")
        self._place(
            stage2_connector(
                self.slot.projector,
                self.config,
                last=self.spec.last,
                channels=token_channels(self.base.config),
                merge=merge_of(self.base.config),
                tasks=(self.own_task, *(task for task in tasks if task != self.own_task)),
                client_adapter=stage1.client_adapter,
                generator=generator,
                reduction=self.balance_reduction,
            )
        )

    def state(
        self,
        group: GroupName,
        *,
        wanted: Callable[[str], bool] = lambda name: True,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Copy the wanted tensors of a group to the CPU, in their own dtype or in `dtype`.

        See `pilot_flwr.algorithm.parameter_groups.GROUPS`.
        """
        return {
            name: parameter.detach().to("cpu", dtype, copy=True)
            for name, parameter in self.groups()[group].items()
            if wanted(name)
        }

    def load(self, group: GroupName, state: State) -> None:
        """Copy tensors into a group; raise `ModelError` if names or shapes differ from its own."""
        parameters = self.groups()[group]
        if difference := layout_difference(state, parameters, dtypes=False):
            raise ModelError(f"Parameters of {group}: {difference}.")
        for name, parameter in parameters.items():
            parameter.data.copy_(state[name])

    def groups(self) -> Groups:
        """Return every parameter by group; cached until the architecture changes."""
        if self._groups is None:
            self._groups = group_parameters(self.base, own_task=self.own_task)
        return self._groups

    def set_lora_rank(self, rank: int) -> None:
        """Set the rank of Θ_l, zero at a new rank; its scale stays the α / r of `config`."""
        for layer in self._lora_layers:
            if layer.r["default"] == rank:
                continue
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            a.weight = nn.Parameter(a.weight.new_zeros(rank, a.in_features))
            b.weight = nn.Parameter(b.weight.new_zeros(b.out_features, rank))
            layer.r["default"] = a.out_features = b.in_features = rank
            layer.lora_alpha["default"] = self.config.lora.alpha / self.config.lora.rank * rank
            self._groups = None

    def set_residual(self, residual: State, *, share: float | None = None) -> None:
        """Replace the frozen LoRA beside Θ_l: R of exact aggregation, which is added to it.

        With `share` it is the received LoRA beside a personal one, and `weigh_lora` weights both.
        """
        if residual or self.groups()["residual"]:
            self._groups = None
            set_residual(self.decoder, residual)
        self.load("residual", residual)
        self.share = share
        if share is None:
            scale_loras(self._lora_layers, self.config.lora, 1.0, 1.0)
        else:
            self.weigh_lora(share)

    def weigh_lora(self, weight: float | Tensor) -> None:
        """Weight Θ_l by `weight`, and the frozen LoRA of `set_residual` by ``1 - weight``.

        `weight` is a number, or one for each row of a batch, shape (B,).
        """
        if isinstance(weight, Tensor):
            weight = weight[:, None, None]  # over tokens and channels
        scale_loras(self._lora_layers, self.config.lora, weight, 1 - weight)

    @functools.cached_property
    def vision_identity(self) -> str:
        """SHA-256 of the vision tower's tensors and of the settings besides the language model's.

        It hashes the tensors in memory, which compute the features: about a second per gigabyte,
        once per load.
        """
        settings = {k: v for k, v in self.base.config.to_dict().items() if k != "text_config"}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.tower.state_dict().items()):
            if ".pilot." in name:  # the connector of some families is a part of the tower
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            content = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(content.view(torch.uint8).numpy()))
        return digest.hexdigest()

    @torch.no_grad()
    def encode_images(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return H_v, frozen features (R, N, D) or (R, D), and the outputs of `ModelSpec.besides`.

        `inputs` are the base model's image inputs.
        """
        besides: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda module, args, output: besides.append(output))
            for module in self._besides()
        ]
        try:
            self.slot.visual = None
            self.base.model.get_image_features(**self._on_device(inputs))
            features = self.slot.seen
        finally:
            self.slot.seen = None
            for hook in hooks:
                hook.remove()
        assert features is not None
        return features, *besides

    @property
    def num_besides(self) -> int:
        """Number of the tower's outputs besides H_v that reach the language model."""
        return len(self._besides())

    def _besides(self) -> list[nn.Module]:
        if not self.spec.besides:
            return []
        return list(self.base.model.get_submodule(self.spec.besides).children())

    def _on_device(self, inputs: Inputs) -> Inputs:
        dtype = next(self.tower.parameters()).dtype
        return {
            name: tensor.to(self.device, dtype if name == PIXELS else None)
            for name, tensor in inputs.items()
        }

    @functools.cached_property
    def _skipped(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Modules of the tower that are skipped on kept features, and their forward pass then.

        A tower that returns a feature map is skipped as a whole. Of others, the layers and the
        patch embeddings are: the projector may be a part of the tower.
        """
        if self.spec.feature_map:
            return [(self.tower, no_features)]
        tower = list(self.tower.modules())
        layers = next(module for module in tower if isinstance(module, nn.ModuleList))
        convolutions = (m for m in tower if isinstance(m, nn.Conv2d | nn.Conv3d))
        return [
            *((layer, unchanged) for layer in layers),
            *((conv, functools.partial(zero_patches, conv)) for conv in convolutions),
        ]

    @contextlib.contextmanager
    def _reading(self, visual: Visual) -> Iterator[Inputs]:
        """Let the connector read kept features in the block; yield the base's image inputs."""
        images = self._on_device(visual.inputs)
        if visual.shapes:
            dtype = next(self.tower.parameters()).dtype
            images[PIXELS] = stand_in(visual.shapes, self.device, dtype)
        kept = zip(self._besides(), visual.besides, strict=True) if visual.besides else ()
        with contextlib.ExitStack() as stack:
            for module, forward in self._skipped:
                stack.enter_context(replaced(module, forward))
            for module, output in kept:
                output = output.to(self.device)
                stack.enter_context(replaced(module, lambda *args, output=output: output))
            self.slot.visual, self.slot.output = visual, None
            try:
                yield images
            finally:
                self.slot.visual = self.slot.output = None

    def forward(self, batch: Batch, visual: Visual) -> ModelOutput:
        """Run the base model; its head sees answer positions only.

        `batch` holds token tensors (B, L) on the model's device, `visual` H_v of its images.
        """
        self.share_lora_inputs(torch.is_autocast_enabled(self.device.type))
        # Before anything large is queued, as the host waits for the result.
        rows, columns = (batch.labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        with self._reading(visual) as images:
            hidden = self.base.model(
                input_ids=batch.input_ids,
                # No mask: the padding is on the right, where causal attention never looks, and
                # without a mask the fastest attention kernels can be used.
                attention_mask=None,
                use_cache=False,
                **batch.token_types,
                **images,
            ).last_hidden_state
            connected = self.slot.output or self.slot.connect()
        answers = hidden[rows.to(hidden.device), columns.to(hidden.device)]
        logits = self.base.lm_head(answers).to(self.device)
        return ModelOutput(logits, batch.labels[rows, columns + 1], connected)

    def share_lora_inputs(self, shared: bool) -> None:
        """Choose whether peft leaves a layer's input in its type instead of casting it.

        Under autocast the cast changes no value, but each of a layer's LoRAs would keep its own
        copy for the backward pass. The choice persists, because checkpointing runs layers again in
        the backward pass.
        """
        for layer in self._lora_layers:
            layer.cast_input_dtype_enabled = not shared

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        visual: Visual,
        *,
        max_new_tokens: int,
        stop: int | None = None,
        streamer: Any = None,
    ) -> Tensor:
        """Decode greedily until `end_tokens`; return new tokens (B, at most `max_new_tokens`).

        transformers' `streamer` receives each token as it is generated.
        """
        ends = self.end_tokens(stop)
        config = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=min(ends, default=0),
        )
        # The length grows with every token: compiled layers would be compiled again each time.
        eager = self.config.compile and torch.compiler.set_stance("force_eager")
        with (
            eager or contextlib.nullcontext(),
            self._without_generation_defaults(),
            self._reading(visual) as images,
        ):
            tokens: Tensor = self.base.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=config,
                streamer=streamer,
                **batch.token_types,
                **images,
            )
        return tokens[:, batch.input_ids.shape[1] :]

    def represent(self, batch: Batch, visual: Visual) -> Tensor:
        """Return the decoder's last hidden state of every prompt's last token (B, C), in float32.

        `batch` is padded on the left, as for `generate`.
        """
        states: list[Tensor] = []
        hook = self.decoder.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state[:, -1])
        )
        try:
            self.generate(batch, visual, max_new_tokens=1)
        finally:
            hook.remove()
        return states[0].float().to(self.device)

    @contextlib.contextmanager
    def _without_generation_defaults(self) -> Iterator[None]:
        """Ignore the checkpoint's own generation settings, such as penalties and beams."""
        defaults = self.base.generation_config
        self.base.generation_config = transformers.GenerationConfig()
        try:
            yield
        finally:
            self.base.generation_config = defaults

    def end_tokens(self, stop: int | None) -> list[int]:
        """Return the ids that end an answer: the checkpoint's and `stop`."""
        ends = self.base.generation_config.eos_token_id
        ids = {ends} if isinstance(ends, int) else set(ends or ())
        return sorted(ids if stop is None else ids | {stop})

    def _place(self, connector: TaskClientConnector | CrossTaskMoA) -> None:
        self.slot.pilot = connector.to(self.device)
        self._groups = None
        set_trainable(self.groups(), stage=self.stage)
