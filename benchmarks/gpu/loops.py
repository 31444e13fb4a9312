"""The two training loops to compare: the package's own, and a plain one.

Both return seconds per optimizer step of one micro-batch, measured at the same point of every step,
right after the host has waited for the device.
"""

import itertools
import re
import time
from typing import Any

import peft
import torch

from gpu.sizes import EXAMPLE, TASKS, FixedData, Size, make_base
from pilot_flwr.client.training import autocast, train
from pilot_flwr.config.train import TrainConfig
from pilot_flwr.model.architectures import spec_of
from pilot_flwr.model.pilot_model import PilotModel

WARM_UP = 2
"""Warm-up steps: allocation, the optimizer's state, compilation."""


class PilotLoop:
    """`pilot_flwr.client.training.train` on cached features.

    Parameters
    ----------
    size : Size
        What to build.
    device : torch.device
        Where.
    stage : int
        1 or 2.
    checkpointing, compiled : bool
        `model.gradient_checkpointing` and `model.compile`.
    """

    def __init__(
        self,
        size: Size,
        device: torch.device,
        *,
        stage: int,
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        config = size.config(checkpointing=checkpointing, compiled=compiled)
        self.model = PilotModel(make_base(size, device), config)
        self.model.enter_stage1(TASKS[0])
        if stage == 2:
            self.model.enter_stage2(TASKS, torch.Generator().manual_seed(0))
        self.data = FixedData(size, self.model.base.config)

    def seconds(self, micro_batch: int, steps: int) -> list[float]:
        """Train for `steps` steps after the warm-up; return the seconds of each."""
        stamps: list[float] = []
        train(
            self.model,
            [EXAMPLE] * (micro_batch * (WARM_UP + steps)),
            collator=self.data,  # type: ignore[arg-type]
            encode=self.data.encoder(self.model),
            config=TrainConfig(batch_size=micro_batch, autocast="bfloat16", log_every_seconds=1e-9),
            generator=torch.Generator().manual_seed(0),
            progress=lambda line: stamps.append(time.perf_counter()),
        )
        return [b - a for a, b in itertools.pairwise(stamps[WARM_UP - 1 :])]

    def release(self) -> None:
        """Release what a failed step has left."""
        self.model.zero_grad(set_to_none=True)


class PlainLoop:
    """A loop written with transformers and peft alone.

    LoRA on the same layers and the projector are trained; images go through the vision tower;
    the loss is the model's own, over the logits of all positions. Precision, checkpointing,
    clipping and the optimizer are as in `PilotLoop`. The frozen tower stays in evaluation.
    """

    def __init__(self, size: Size, device: torch.device, *, checkpointing: bool = False) -> None:
        base = make_base(size, device)
        base.requires_grad_(False)
        self.tower = base.model.get_submodule(spec_of(base.config).tower).eval()
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})
        decoder = base.model.get_decoder()
        path = next(name for name, module in base.named_modules() if module is decoder)
        names = "|".join(map(re.escape, size.lora.targets))
        self.model: Any = peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=size.lora.rank,
                lora_alpha=size.lora.alpha,
                target_modules=rf"{re.escape(path)}\..*\.({names})",
            ),
        )
        connector = base.model.get_submodule(spec_of(base.config).projector)
        connector.float().requires_grad_(True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.device = device
        self.data = FixedData(size, base.config)

    def seconds(self, micro_batch: int, steps: int) -> list[float]:
        """Train for `steps` steps after the warm-up; return the seconds of each."""
        fused = True if self.device.type == "cuda" else None
        optimizer = torch.optim.AdamW(self.trained, lr=2e-5, weight_decay=0.0, fused=fused)
        self.model.train()
        self.tower.eval()
        stamps = []
        for _ in range(WARM_UP + steps):
            loss = self.loss(micro_batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            loss.item()
            stamps.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [b - a for a, b in itertools.pairwise(stamps[WARM_UP - 1 :])]

    def loss(self, micro_batch: int) -> torch.Tensor:
        """Run one forward pass."""
        batch = self.data.train_batch([EXAMPLE] * micro_batch).to(self.device)
        images = self.data.images(micro_batch)
        with autocast(self.device, "bfloat16"):
            output = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
                use_cache=False,
                **batch.token_types,
                **{name: tensor.to(self.device) for name, tensor in images.items()},
            )
        loss: torch.Tensor = output.loss
        return loss

    def release(self) -> None:
        """Release what a failed step has left."""
        self.model.zero_grad(set_to_none=True)
