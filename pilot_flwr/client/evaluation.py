"""Evaluate one client's personalised model: greedy generation, then the task's metric.

A personal LoRA beside the received one can be weighted separately for every question
(`instance_weights`; Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models",
NeurIPS 2024, arXiv 2403.19211).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pilot_flwr.client.parallel import Ranks
from pilot_flwr.client.training import ALONE, Encoder, autocast
from pilot_flwr.config.schema import EvaluationConfig
from pilot_flwr.data.collator import Batch, Collator
from pilot_flwr.data.examples import Example
from pilot_flwr.errors import DataError
from pilot_flwr.metrics import METRICS
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.slot import Visual
from pilot_flwr.protocol import EvaluationResult


class Answers(NamedTuple):
    """Texts of the answers, and how many the length limit truncated."""

    texts: list[str]
    cut: int


def evaluate(
    model: PilotModel,
    examples: Sequence[Example],
    *,
    collator: Collator,
    encode: Encoder,
    metric: str,
    config: EvaluationConfig,
    autocast_choice: str,
    instances: Sequence[Example] = (),
    ranks: Ranks = ALONE,
) -> EvaluationResult:
    """Answer all examples in the precision of training; score the answers by a key of `METRICS`.

    `instances` are those of `represent_instances`. Called in rank 0 alone; the other ranks call it
    and `answer`.
    """
    if not examples:
        raise DataError("There is no test example.")
    started = time.perf_counter()
    how: dict[str, Any] = {
        "collator": collator,
        "encode": encode,
        "config": config,
        "autocast_choice": autocast_choice,
    }
    known = represent_instances(model, instances, **how)
    answers = answer(model, examples, **how, known=known, ranks=ranks)
    score = METRICS[metric].score(answers.texts, [example.answers for example in examples])
    return EvaluationResult(
        score.mean,
        metric,
        len(examples),
        time.perf_counter() - started,
        approximate=bool(METRICS[metric].approximate()),
        cut=answers.cut,
    )


def answer(
    model: PilotModel,
    examples: Sequence[Example],
    *,
    collator: Collator,
    encode: Encoder,
    config: EvaluationConfig,
    autocast_choice: str,
    known: Tensor | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[int], None] = lambda done: None,
    streamer: Any = None,
) -> Answers:
    """Answer the last question of every example, greedily; each of the `ranks` answers a share.

    `known` has the representations (S, C) of `represent_instances`, if any. `progress` gets the
    number of this rank's answers after each batch, transformers' `streamer` the tokens of a single
    example's answer. All ranks return all answers.
    """
    model.eval()
    answers: list[str] = []
    cut = 0
    size = min(config.batch_size, math.ceil(len(examples) / ranks.number))
    starts = ranks.own(range(0, len(examples), size))
    parts = [range(start, min(start + size, len(examples))) for start in starts]
    stop = collator.end_token_id()
    visuals = encode([examples[i] for i in part] for part in parts)
    for part in parts:
        batch = collator.prompt_batch([examples[i] for i in part]).to(model.device)
        with autocast(model.device, autocast_choice):
            visual = next(visuals)
            if known is not None:
                _weigh(model, batch, visual, known)
            tokens = model.generate(
                batch,
                visual,
                max_new_tokens=config.max_new_tokens,
                stop=stop,
                streamer=streamer,
            )
        ended = torch.isin(tokens, torch.tensor(model.end_tokens(stop), device=tokens.device))
        cut += int((~ended.any(-1)).sum())
        answers += collator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        progress(len(answers))
    own: list[Any] = [cut, *zip((i for part in parts for i in part), answers, strict=True)]
    found = ranks.collect(own)
    by_example = {i: text for _, *texts in found for i, text in texts}
    return Answers([by_example[i] for i in range(len(examples))], sum(cut for cut, *_ in found))


def represent_instances(
    model: PilotModel,
    instances: Sequence[Example],
    *,
    collator: Collator,
    encode: Encoder,
    config: EvaluationConfig,
    autocast_choice: str,
) -> Tensor | None:
    """Represent training examples by the personal LoRA alone, (S, C); None if there are none."""
    if not instances:
        return None
    model.eval()
    model.weigh_lora(1.0)
    size, found = config.batch_size, []
    parts = [instances[start : start + size] for start in range(0, len(instances), size)]
    visuals = encode(parts)
    for part in parts:
        batch = collator.prompt_batch(part).to(model.device)
        with autocast(model.device, autocast_choice):
            found.append(model.represent(batch, next(visuals)))
    return torch.cat(found)


def instance_weights(shown: Tensor, known: Tensor, *, largest: float) -> Tensor:
    """Return the weight of the personal LoRA for each question.

    The cosines of its representation h and those of the S training instances are averaged; a
    negative mean counts as 0::

        a = largest · max(0, 1/S Σ_s cos(h, h_s))

    Shapes: `shown` (B, C), `known` (S, C), the weights (B,).
    """
    cosines = functional.cosine_similarity(shown[:, None], known[None], dim=-1)
    return largest * cosines.mean(1).clamp(min=0)


def _weigh(model: PilotModel, batch: Batch, visual: Visual, known: Tensor) -> None:
    """Weight the personal LoRA for every question of a batch; represent them by it alone."""
    assert model.share is not None
    model.weigh_lora(1.0)
    shown = model.represent(batch, visual)
    model.weigh_lora(instance_weights(shown, known, largest=model.share))
