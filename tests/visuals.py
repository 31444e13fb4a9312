"""Visual features for tests, made the plain way: no cache, no workers."""

import torch

from pilot_flwr.model.pilot_model import Visual
from pilot_flwr.model.processor import collate, rows_of


def visual(model, processor, examples):
    """H_v of examples, each of one image or of none."""
    sources = [image for example in examples for image in example.images]
    if not sources:
        return Visual(torch.empty(0, 0, 0), (), {})
    inputs = [processor.inputs(image.read(), alone=True) for image in sources]
    rows = tuple(rows_of(one["pixel_values"].shape) for one in inputs)
    features, *besides = model.encode_images(collate(inputs))
    return Visual(features, rows, collate(inputs), tuple(besides))


def encoder(model, processor):
    """What `train` and `evaluate` take as `encode`."""
    return lambda parts: (visual(model, processor, part) for part in parts)
