"""Visual features for tests, made the plain way: no cache, no workers."""

import torch

from pilot_flwr.model.processor import collate, rows_of
from pilot_flwr.model.slot import Visual


def visual(model, processor, examples):
    """H_v of examples, each of one image or of none."""
    sources = [image for example in examples for image in example.images]
    if not sources:
        return Visual(torch.empty(0, 0, 0), (), {})
    inputs = [processor.inputs(image.read(), alone=True) for image in sources]
    rows = tuple(rows_of(one["pixel_values"].shape) for one in inputs)
    together = [1] * len(inputs)
    features, *besides = model.encode_images(collate(inputs, together=together))
    return Visual(features, rows, collate(inputs, together=together), (), tuple(besides))


def encoder(model, processor):
    """What `train` and `evaluate` take as `encode`."""
    return lambda parts: (visual(model, processor, part) for part in parts)


def encoded(processor, collator, one, *, generate=False):
    """A conversation's inputs by transformers' own processor."""
    turns = one.turns[:-1] if generate else one.turns
    text = collator._render(turns, generate=generate).text
    bos = processor.tokenizer.bos_token
    options = {"images": [[source.read() for source in one.images]]} if one.images else {}
    return processor.original(
        text=[text],
        add_special_tokens=not (bos and text.startswith(bos)),
        return_tensors="pt",
        **options,
    )
