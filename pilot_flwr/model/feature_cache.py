"""Cache the visual features of the frozen vision tower.

H_v of an image depends on its content, the way of reading it, the image processor and the vision
tower, and on nothing else of a run. Features are kept in memory (shared by all sessions of a
process) up to a limit, without removing any, or in a `FeatureFolder`, which runs share; images
beyond the limit are encoded again. Threads read and decode images while the model encodes the
previous batch.

The last bits of an image's features can depend on the other images in its batch, so a run that
finds features in the cache can differ by as much from one that computes them.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import PIL
import torch
import transformers
from torch import Tensor

from pilot_flwr.config.model import FeatureCacheConfig
from pilot_flwr.data.examples import Example
from pilot_flwr.model.feature_folder import FeatureFolder
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.processor import PIXELS, Inputs, Layout, Processor, collate, rows_of
from pilot_flwr.model.slot import Visual

_PIXELS_AT_A_TIME = 32 * 3 * 384**2
"""Most pixel values in one call of the vision tower, unless one image has more; bounds memory."""

_ZERO_IMAGE = (336, 336)
"""Size of the zero image of examples without images (`train.text_only`)."""

Features = tuple[Tensor, ...]
"""H_v of one image, and its outputs of the modules of `ModelSpec.besides`."""

_MEMORY: dict[str, Features] = {}
_used_memory = 0


class _Decoded(NamedTuple):
    """One batch as read by a worker."""

    images: list[tuple[str, Layout]]
    """Key and layout of every image, in the batch's order."""
    kept: dict[str, Features]
    """Cached features by key."""
    inputs: dict[str, Inputs]
    """Inputs of the other images by key."""
    together: tuple[int, ...]
    """Number of images of every example that has any."""
    texts: int
    """Number of examples without images."""


class FeatureCache:
    """H_v of one client's images.

    `folder` is needed with `model.feature_cache.where=disk`. With `zero_images`, an example without
    images has one row of features, that of an image of zeros, at the end of its batch's.
    """

    def __init__(
        self,
        config: FeatureCacheConfig,
        folder: FeatureFolder | None = None,
        *,
        zero_images: bool = False,
    ) -> None:
        assert folder is not None or config.where != "disk"
        self.config = config
        self.folder = folder
        self.zero_images = zero_images
        self._zero: Tensor | None = None
        self.limit = int(config.max_gib * 2**30)
        self._bases: dict[tuple[int, int], str] = {}

    def encode(
        self, model: PilotModel, processor: Processor, examples: Sequence[Example]
    ) -> Visual:
        """Return H_v of the examples' images; encode those that are not cached."""
        return self._encode(model, processor, self._decode(model, processor, examples))

    def stream(
        self,
        model: PilotModel,
        processor: Processor,
        parts: Iterable[Sequence[Example]],
        *,
        workers: int,
    ) -> Iterator[Visual]:
        """Yield H_v of each batch in `parts`, reading ahead.

        Each of `workers` threads decodes one batch; with 0 the caller's thread does.
        """
        if workers == 0:
            yield from (self.encode(model, processor, part) for part in parts)
            return
        waiting: deque[Future[_Decoded]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for part in parts:
                    waiting.append(pool.submit(self._decode, model, processor, part))
                    if len(waiting) > workers:
                        yield self._encode(model, processor, waiting.popleft().result())
                while waiting:
                    yield self._encode(model, processor, waiting.popleft().result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _decode(
        self, model: PilotModel, processor: Processor, examples: Sequence[Example]
    ) -> _Decoded:
        """Read the cached features, and the inputs of all other images, once each."""
        shown = [example for example in examples if example.images]
        together = tuple(len(example.images) for example in shown)
        decoded = _Decoded([], {}, {}, together, len(examples) - len(shown))
        for example in shown:
            alone = len(example.images) == 1
            keys = self._keys(model, processor, example)
            for key, image in zip(keys, example.images, strict=True):
                decoded.images.append((key, processor.layout(image.size(), alone=alone)))
                if key in decoded.kept or key in decoded.inputs:
                    continue
                if (cached := self._get(model, key)) is not None:
                    decoded.kept[key] = cached
                else:
                    decoded.inputs[key] = processor.inputs(image.read(), alone=alone)
        return decoded

    def _encode(self, model: PilotModel, processor: Processor, decoded: _Decoded) -> Visual:
        kept, fresh = dict(decoded.kept), {}
        for key, inputs in decoded.inputs.items():
            # A previous batch may have encoded it meanwhile; the workers' order must not matter.
            features = kept[key] if key in kept else self._get(model, key)
            if features is None:
                fresh[key] = inputs
            else:
                kept[key] = features
        for keys in _portions(fresh):
            images = [fresh[key] for key in keys]
            parts = _encoded(model, images, alone=_alone(keys[0]))
            kept |= (encoded := dict(zip(keys, parts, strict=True)))
            if self.config.where != "off":
                self._put({key: tuple(t.cpu() for t in e) for key, e in encoded.items()})
        layouts = [layout for _, layout in decoded.images]
        parts = [kept[key] for key, _ in decoded.images]
        shapes = tuple(layout.shape for layout in layouts)
        others = [layout.others for layout in layouts]
        inputs = collate(others, together=decoded.together) if layouts else {}
        visual = [part[0] for part in parts]
        whole = (_concatenate(each, model.device) for each in list(zip(*parts, strict=True))[1:])
        besides, rows = tuple(whole), tuple(layout.rows for layout in layouts)
        zeros = decoded.texts if self.zero_images else 0
        if zeros:
            zero = self._zero_image(model, processor)
            rows += (len(zero),) * zeros
            visual += [zero] * zeros
        if not visual:
            return Visual(torch.empty(0, 0, 0), (), {})
        return Visual(_concatenate(visual, model.device), rows, inputs, shapes, besides, zeros)

    def _zero_image(self, model: PilotModel, processor: Processor) -> Tensor:
        """Return the first row of H_v for an image whose pixels are zero after normalization."""
        if self._zero is None:
            layout = processor.layout(_ZERO_IMAGE, alone=False)
            # Not exactly zero: some families take an image of zeros for padding.
            inputs = layout.others | {PIXELS: torch.full(layout.shape, 1e-7)}
            ((features, *_),) = _encoded(model, [inputs], alone=False)
            self._zero = features[:1] if features.dim() == 3 else features
        return self._zero

    def _keys(self, model: PilotModel, processor: Processor, example: Example) -> list[str]:
        """Return a key for each image of an example, of everything that its features depend on."""
        base = self._base(model, processor) if self.config.where != "off" else ""
        alone = len(example.images) == 1 or not processor.crops_alone
        return [f"{base}/{image.identity()}/{alone}" for image in example.images]

    def _base(self, model: PilotModel, processor: Processor) -> str:
        """Return the common part of all keys: vision tower, image processor and libraries."""
        used = id(model), id(processor)
        if used not in self._bases:
            settings = processor.image_processor.to_json_string()
            digest = hashlib.sha256(settings.encode()).hexdigest()
            versions = f"{torch.__version__}/{transformers.__version__}/{PIL.__version__}"
            self._bases[used] = f"{model.vision_identity}/{model.device.type}/{digest}/{versions}"
        return self._bases[used]

    def _get(self, model: PilotModel, key: str) -> Features | None:
        if self.config.where == "memory":
            return _MEMORY.get(key)
        if self.folder is None:
            return None
        found = [self.folder.get(name) for name in _names(key, 1 + model.num_besides)]
        return None if any(part is None for part in found) else tuple(found)  # type: ignore[arg-type]

    def _put(self, entries: dict[str, Features]) -> None:
        global _used_memory
        if self.folder is not None:
            named = {key: zip(_names(key, len(e)), e, strict=True) for key, e in entries.items()}
            self.folder.put({name: t for parts in named.values() for name, t in parts})
        elif self.config.where == "memory":
            for key, features in entries.items():
                size = sum(tensor.nbytes for tensor in features)
                if _used_memory + size <= self.limit:
                    _MEMORY[key] = tuple(tensor.clone() for tensor in features)  # not the batch
                    _used_memory += size


def _names(key: str, count: int) -> list[str]:
    return [key, *(f"{key}/{number}" for number in range(1, count))]


def _portions(inputs: dict[str, Inputs]) -> Iterator[list[str]]:
    """Yield the keys of each call of the vision tower.

    Images that are their example's only one are encoded apart from the others.
    """
    portion: list[str] = []
    pixels = 0
    for key, image in sorted(inputs.items(), key=lambda item: _alone(item[0])):
        size = image[PIXELS].numel()
        other = bool(portion) and _alone(portion[0]) != _alone(key)
        if portion and (other or pixels + size > _PIXELS_AT_A_TIME):
            yield portion
            portion, pixels = [], 0
        portion.append(key)
        pixels += size
    if portion:
        yield portion


def _alone(key: str) -> bool:
    return key.endswith("/True")


def _encoded(model: PilotModel, images: Sequence[Inputs], *, alone: bool) -> list[Features]:
    """Encode several images in one call; return the features of each."""
    rows = [rows_of(image[PIXELS].shape) for image in images]
    together = [1] * len(images) if alone else [max(2, len(images))]
    split = []
    for tensor in model.encode_images(collate(images, together=together)):
        merged = sum(rows) // len(tensor)  # outputs besides H_v are per token
        split.append(torch.split(tensor, [count // merged for count in rows]))
    return list(zip(*split, strict=True))


def forget_features() -> None:
    """Free all features in this process's memory; runs do not share them."""
    global _used_memory
    _MEMORY.clear()
    _used_memory = 0


def _concatenate(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Concatenate on `device`, with one copy if all tensors are on the host."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return torch.cat(list(tensors)).to(device)
    return torch.cat([tensor.to(device) for tensor in tensors])
