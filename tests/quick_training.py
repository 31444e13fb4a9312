"""A training that takes no time: it moves at random what the stage trains.

For tests of what server and client do around a training. All of it but the gradient steps is real.
"""

import contextlib

import pytest
import torch

from pilot_flwr.client import rank
from pilot_flwr.protocol import LOSSES, TrainingResult


def _train(model, examples, *, generator, run_schedule=None, **_):
    if run_schedule is not None:
        run_schedule.moments = {"lora/step": torch.tensor(1.0)}  # kept, never restored
    for tensor in model.parameters():
        if tensor.requires_grad:
            step = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.data += 0.01 * step.to(tensor)
    return TrainingResult(dict.fromkeys(LOSSES, 0.5), 1, len(examples), 0.1, {"lora": 1})


@contextlib.contextmanager
def quick_training():
    """Train at random in this context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "train", _train)
        yield
