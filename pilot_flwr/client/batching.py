"""Divide a client's examples into the micro-batches of every optimizer step."""

from collections.abc import Sequence

import torch

from pilot_flwr.config.train import TrainConfig
from pilot_flwr.data.examples import Example


def optimizer_steps(
    examples: Sequence[Example], config: TrainConfig, generator: torch.Generator
) -> list[list[list[int]]]:
    """Return the micro-batches of every optimizer step of every epoch, in random order."""
    steps = []
    by_length = config.batching == "length"
    lengths = [_words(example) for example in examples] if by_length else []
    for _ in range(config.epochs):
        if by_length:
            order = _by_length(lengths, config, generator)
        else:
            order = torch.randperm(len(examples), generator=generator).tolist()
        parts = [
            order[start : start + config.batch_size]
            for start in range(0, len(examples), config.batch_size)
        ]
        steps += [
            parts[start : start + config.accumulation_steps]
            for start in range(0, len(parts), config.accumulation_steps)
        ]
    return steps


def _words(example: Example) -> int:
    """Return the number of words of a conversation, negative without an image."""
    words = sum(len(turn.text.split()) for turn in example.turns)
    return words if example.images else -words


def _by_length(
    lengths: Sequence[int], config: TrainConfig, generator: torch.Generator
) -> list[int]:
    """Order the examples of an epoch so that those of one step are similar in length and kind.

    As ``group_by_modality_length`` in the official code, on one device: the examples with images
    and those without are drawn apart, step by step. The micro-batches of a step are equal in
    length as far as possible. The order of the steps is random, but the examples of the last step
    of each kind share the end of the epoch.
    """
    size = config.batch_size * config.accumulation_steps
    kinds: list[list[list[int]]] = []
    for kind in (
        [i for i, n in enumerate(lengths) if n > 0],
        [i for i, n in enumerate(lengths) if n < 0],
    ):
        drawn = [kind[i] for i in torch.randperm(len(kind), generator=generator).tolist()]
        steps = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        kinds.append([_balanced(step, lengths, config.accumulation_steps) for step in steps])
    if not all(kinds):
        return [i for steps in kinds for step in steps for i in step]
    full = [step for steps in kinds for step in steps[:-1]]
    order = torch.randperm(len(full), generator=generator).tolist()
    rest = sorted(i for steps in kinds for i in steps[-1])
    return [i for number in order for i in full[number]] + rest


def _balanced(step: list[int], lengths: Sequence[int], parts: int) -> list[int]:
    """Order a step's examples so that its `parts` micro-batches have similar total lengths.

    From the longest to the shortest, each goes to the shortest micro-batch that is not full; in
    a step that does not divide evenly, to the next one in turn.
    """
    falling = sorted(step, key=lambda i: abs(lengths[i]), reverse=True)
    if len(step) % parts:
        return [i for first in range(parts) for i in falling[first::parts]]
    chunks: list[list[int]] = [[] for _ in range(parts)]
    for i in falling:
        room = [chunk for chunk in chunks if len(chunk) < len(step) // parts]
        min(room, key=lambda chunk: sum(abs(lengths[j]) for j in chunk)).append(i)
    return [i for chunk in chunks for i in chunk]
