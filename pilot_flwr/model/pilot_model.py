"""The base model with Pilot's adapters, and the switch from stage 1 to stage 2.

`PilotModel` is a frozen Hugging Face LLaVA model with a peft LoRA (Θ_l, the text adapter) in its
language model and a Pilot connector in place of its projector. One base serves all clients of a
process: each session swaps adapters in and out, and the base is never loaded again.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pilot_flwr.algorithm.arrays import layout_difference
from pilot_flwr.algorithm.connector import (
    Adapter,
    ConnectorOutput,
    CrossTaskMoA,
    TaskClientConnector,
    stage1_connector,
    stage2_connector,
)
from pilot_flwr.algorithm.parameter_groups import Groups, group_parameters, set_trainable
from pilot_flwr.config.model import LoraConfig, ModelConfig
from pilot_flwr.data.collator import IGNORE_INDEX, Batch
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import (
    Visual,
    check_targets,
    is_plain,
    select_features,
    spec_of,
)
from pilot_flwr.protocol import GroupName, State

RESIDUAL = "residual"
"""peft's name of the second LoRA; Θ_l's is ``default``."""


def transformers_config(base: Any) -> Any:
    """Convert a checkpoint's configuration to transformers' class, however it was read."""
    if not is_plain(base):
        return base
    parts = {part: vars(getattr(base, part)) for part in ("text_config", "vision_config")}
    return transformers.AutoConfig.for_model(**{**vars(base), **parts})


def empty_base(base: Any) -> Any:
    """Build the base model of a configuration on the meta device."""
    with torch.device("meta"):
        return getattr(transformers, spec_of(base).model_class)(transformers_config(base))


def empty_model(
    config: ModelConfig, base: Any, *, tasks: tuple[str, ...], stage: int
) -> "PilotModel":
    """Build a model of a stage on the meta device; `tasks[0]` is the client's own task."""
    llava = empty_base(base).to(getattr(torch, config.dtype))
    with torch.device("meta"):
        model = PilotModel(llava, config)
        model.enter_stage1(tasks[0])
        if stage == 2:
            model.enter_stage2(tasks, torch.Generator("cpu"))
    return model


def add_lora(language_model: nn.Module, lora: LoraConfig, *, dtype: torch.dtype) -> None:
    """Add Θ_l to the language model in place; `ModelError` if a target is not a linear layer."""
    linear = [name for name, m in language_model.named_modules() if isinstance(m, nn.Linear)]
    check_targets(linear, lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    peft.inject_adapter_in_model(config, language_model)
    for name, parameter in language_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def _set_residual(language_model: nn.Module, residual: Mapping[str, Tensor]) -> None:
    """Put the residual of exact aggregation beside Θ_l, in place of the previous one.

    Every layer with a ``<layer>.lora_A`` and ``<layer>.lora_B`` in `residual` gets a second,
    frozen LoRA of peft: same scale, no dropout, float32.
    """
    trainable = {name for name, p in language_model.named_parameters() if p.requires_grad}
    for name, layer in language_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if RESIDUAL in layer.lora_A:
            layer.delete_adapter(RESIDUAL)
        factor = residual.get(f"{name}.lora_A")
        if factor is None:
            continue
        if factor.ndim != 2 or not len(factor):
            raise ModelError(f"The residual of `{name}` has factors of shape {list(factor.shape)}.")
        config = peft.LoraConfig(r=len(factor), lora_dropout=0.0, init_lora_weights=False)
        layer.update_layer(RESIDUAL, len(factor), config.lora_alpha, config)
        layer.scaling[RESIDUAL] = layer.scaling["default"]
        layer.set_adapter(["default", RESIDUAL])
    for name, parameter in language_model.named_parameters():
        if f".{RESIDUAL}." in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(name in trainable and f".{RESIDUAL}." not in name)


class ModelOutput(NamedTuple):
    """Logits (M, V) and labels (M,) of a batch's M answer tokens, and the connector's output."""

    logits: Tensor
    labels: Tensor
    connector: ConnectorOutput


class PilotModel(nn.Module):
    """A frozen LLaVA with Θ_l and a connector; `llava` is changed in place.

    `reduction` is that of L_d, `balance_reduction` that of L_b.
    """

    def __init__(
        self,
        llava: Any,
        config: ModelConfig,
        *,
        reduction: str = "normalized",
        balance_reduction: str = "pooled",
    ) -> None:
        super().__init__()
        self.config = config
        self.reduction, self.balance_reduction = reduction, balance_reduction
        self.spec = spec_of(llava.config)
        dtype = getattr(torch, config.adapter_dtype)
        llava.requires_grad_(False)
        add_lora(llava.model.language_model, config.lora, dtype=dtype)
        self.llava = llava
        if config.gradient_checkpointing:
            llava.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            for layer in llava.model.language_model.layers:
                layer.compile(dynamic=True)
        self.own_task = ""  # the task of the client whose session it is
        self._groups: Groups | None = None
        self._lora_layers = [m for m in llava.modules() if isinstance(m, LoraLayer)]
        # In a tuple, so that torch does not register it: only new adapters start from it.
        self._projector = (_projector_as_adapter(llava.model.multi_modal_projector).to(dtype),)

    @property
    def connector(self) -> TaskClientConnector | CrossTaskMoA:
        """The connector in place of the projector."""
        connector: TaskClientConnector | CrossTaskMoA = self.llava.model.multi_modal_projector
        return connector

    @property
    def device(self) -> torch.device:
        """Device of the base."""
        device: torch.device = self.llava.device
        return device

    @property
    def stage(self) -> int:
        """1 or 2, by the connector in place."""
        return 2 if isinstance(self.connector, CrossTaskMoA) else 1

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but the vision tower: it is frozen and stays in evaluation."""
        super().train(mode)
        self.llava.model.vision_tower.eval()
        return self

    def enter_stage1(self, own_task: str, *, initialisation: str | None = None) -> None:
        """Start a client's session with a new stage-1 connector from the pretrained projector.

        `initialisation` overrides the configured one; with ``identity`` the model equals the base
        model until parameters are loaded or trained.
        """
        self.own_task = own_task
        config = replace(self.config, initialisation=initialisation or self.config.initialisation)
        self._place(stage1_connector(self._projector[0], config, reduction=self.reduction))

    def enter_stage2(self, tasks: Sequence[str], generator: torch.Generator) -> None:
        """Replace the stage-1 connector by CT-MoA of all `tasks`: keep ψ_s, create ψ_c and φ."""
        stage1 = self.connector
        if not isinstance(stage1, TaskClientConnector):
            raise ModelError("Stage 2 can only be entered from stage 1.")
        if self.own_task not in tasks:
            raise ModelError(f"The own task {self.own_task!r} is not among {list(tasks)}.")
        self._place(
            stage2_connector(
                self._projector[0],
                self.config,
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
            self._groups = group_parameters(self.llava, own_task=self.own_task)
        return self._groups

    def set_lora_rank(self, rank: int) -> None:
        """Give Θ_l a rank, of zeros if it is new, at the scale α / r of `config` in any case."""
        for layer in self._lora_layers:
            if layer.r["default"] == rank:
                continue
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            a.weight = nn.Parameter(a.weight.new_zeros(rank, a.in_features))
            b.weight = nn.Parameter(b.weight.new_zeros(b.out_features, rank))
            layer.r["default"] = a.out_features = b.in_features = rank
            layer.lora_alpha["default"] = layer.scaling["default"] * rank
            self._groups = None

    def set_residual(self, residual: State) -> None:
        """Replace R, the frozen residual of exact aggregation beside Θ_l."""
        if residual or self.groups()["residual"]:
            self._groups = None
            _set_residual(self.llava.model.language_model, residual)
        self.load("residual", residual)

    @functools.cached_property
    def vision_identity(self) -> str:
        """SHA-256 of the vision tower's tensors and of the settings that select its features.

        It hashes the tensors in memory, which compute the features: about a second per gigabyte,
        once per load.
        """
        config = self.llava.config
        chosen = (config.vision_feature_layer, config.vision_feature_select_strategy)
        grid = getattr(config, "image_grid_pinpoints", None)
        digest = hashlib.sha256(f"{config.vision_config.to_json_string()}/{chosen}/{grid}".encode())
        for name, tensor in sorted(self.llava.model.vision_tower.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            content = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(content.view(torch.uint8).numpy()))
        return digest.hexdigest()

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return H_v = f(X_v): frozen patch features (R, N, D) of pixels (R, 3, height, width)."""
        tower = self.llava.model.vision_tower
        output = tower(pixel_values.to(self.device, tower.dtype), output_hidden_states=True)
        return select_features(self.llava.config, output.hidden_states)

    def forward(self, batch: Batch, visual: Visual) -> ModelOutput:
        """Run connector and language model; the LM head sees answer positions only.

        `batch` holds token tensors (B, L) on the model's device, `visual` H_v of its images.
        """
        self.share_lora_inputs(torch.is_autocast_enabled(self.device.type))
        # Before anything large is queued, as the host waits for the result.
        rows, columns = (batch.labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        connected = self._connect(visual)
        hidden = self.llava.model.language_model(
            inputs_embeds=self._embed(batch.input_ids, connected.features, visual),
            # No mask: the padding is on the right, where causal attention never looks, and
            # without a mask the fastest attention kernels can be used.
            attention_mask=None,
            use_cache=False,
        ).last_hidden_state
        logits = self.llava.lm_head(hidden[rows, columns])
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
        connected = self._connect(visual)
        ends = self.end_tokens(stop)
        config = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=min(ends, default=0),
        )
        # The length grows with every token: compiled layers would be compiled again each time.
        eager = self.config.compile and torch.compiler.set_stance("force_eager")
        with eager or contextlib.nullcontext(), self._without_generation_defaults():
            tokens: Tensor = self.llava.generate(
                inputs_embeds=self._embed(batch.input_ids, connected.features, visual),
                attention_mask=batch.attention_mask,
                generation_config=config,
                streamer=streamer,
            )
        return tokens

    @contextlib.contextmanager
    def _without_generation_defaults(self) -> Iterator[None]:
        """Ignore the checkpoint's own generation settings, such as penalties and beams."""
        defaults = self.llava.generation_config
        self.llava.generation_config = transformers.GenerationConfig()
        try:
            yield
        finally:
            self.llava.generation_config = defaults

    def end_tokens(self, stop: int | None) -> list[int]:
        """Return the ids that end an answer: the checkpoint's and `stop`."""
        ends = self.llava.generation_config.eos_token_id
        ids = {ends} if isinstance(ends, int) else set(ends or ())
        return sorted(ids if stop is None else ids | {stop})

    def _connect(self, visual: Visual) -> ConnectorOutput:
        """Run the connector; a batch without rows gives no features and zero losses."""
        adapter = self._projector[0]
        if not len(visual.features):
            empty = adapter.linear_2.weight.new_zeros(0, 0, adapter.linear_2.out_features)
            zero = empty.new_zeros(())
            return ConnectorOutput(empty.to(self.device), *3 * (zero.to(self.device),))
        features = visual.features.to(self.device, adapter.linear_1.weight.dtype)
        output: ConnectorOutput = self.connector(features)
        return output

    def _embed(self, input_ids: Tensor, rows: Tensor, visual: Visual) -> Tensor:
        """Return token embeddings with x_img in place of the image tokens."""
        embeddings: Tensor = self.llava.get_input_embeddings()(input_ids)
        if not visual.images:
            return embeddings
        rows = rows[: sum(image.rows for image in visual.images)]
        tokens = self.spec.pack(self.llava, rows, visual.images)
        places = (input_ids.flatten() == self.llava.config.image_token_id).nonzero().squeeze(1)
        if len(places) != len(tokens):
            raise ModelError(
                f"The batch has {len(places)} image tokens for {len(tokens)} visual features."
            )
        flat = embeddings.flatten(0, 1).index_copy(0, places, tokens.to(embeddings.dtype))
        return flat.reshape(embeddings.shape)

    def _place(self, connector: TaskClientConnector | CrossTaskMoA) -> None:
        self.llava.model.multi_modal_projector = connector.to(self.device)
        self._groups = None
        set_trainable(self.groups(), stage=self.stage)


def _projector_as_adapter(projector: Any) -> Adapter:
    weight = projector.linear_1.weight
    adapter = Adapter(weight.shape[1], weight.shape[0], bias=projector.linear_1.bias is not None)
    adapter.to(weight).load_state_dict(projector.state_dict())
    return adapter
