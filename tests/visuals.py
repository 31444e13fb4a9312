"""Visual features for tests, made the plain way: no cache, no workers."""

import torch

from pilot_flwr.model.architectures import ImageShape, Visual


def visual(model, processor, examples):
    """H_v of a plain LLaVA's examples, each of one image or of none."""
    images = [image.read() for example in examples for image in example.images]
    if not images:
        return Visual(torch.empty(0, 16, 1), ())
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    shapes = tuple(ImageShape(1, image.height, image.width) for image in images)
    return Visual(model.encode_images(pixels), shapes)


def encoder(model, processor):
    """What `train` and `evaluate` take as `encode`."""
    return lambda parts: (visual(model, processor, part) for part in parts)
