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
from typing import Any, NamedTuple

import PIL
import torch
import transformers
from torch import Tensor

from pilot_flwr.config.model import FeatureCacheConfig
from pilot_flwr.data.examples import Example
from pilot_flwr.model.architectures import ImageShape, Visual, feature_size
from pilot_flwr.model.feature_folder import FeatureFolder
from pilot_flwr.model.pilot_model import PilotModel

_ROWS_AT_A_TIME = 32
"""Crops that the vision tower sees at once, which bounds its memory."""

_MEMORY: dict[str, Tensor] = {}
_used_memory = 0


class _Decoded(NamedTuple):
    """One batch as read by a worker."""

    images: list[tuple[str, int, int]]
    """Key, height and width of every image, in the batch's order."""
    kept: dict[str, Tensor]
    """Cached features (rows, N, D) by key."""
    pixels: dict[str, Tensor]
    """Pixels of the other images by key."""
    texts: int = 0
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
        self, model: PilotModel, image_processor: Any, examples: Sequence[Example]
    ) -> Visual:
        """Return H_v of the examples' images; encode those that are not cached."""
        return self._encode(model, self._decode(model, image_processor, examples))

    def stream(
        self,
        model: PilotModel,
        image_processor: Any,
        parts: Iterable[Sequence[Example]],
        *,
        workers: int,
    ) -> Iterator[Visual]:
        """Yield H_v of each batch in `parts`, reading ahead.

        Each of `workers` threads decodes one batch; with 0 the caller's thread does.
        """
        if workers == 0:
            yield from (self.encode(model, image_processor, part) for part in parts)
            return
        waiting: deque[Future[_Decoded]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for part in parts:
                    waiting.append(pool.submit(self._decode, model, image_processor, part))
                    if len(waiting) > workers:
                        yield self._encode(model, waiting.popleft().result())
                while waiting:
                    yield self._encode(model, waiting.popleft().result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _decode(
        self, model: PilotModel, image_processor: Any, examples: Sequence[Example]
    ) -> _Decoded:
        """Read the cached features, and the pixels of all other images, once each."""
        decoded = _Decoded([], {}, {})
        for example in examples:
            keys = self._keys(model, image_processor, example)
            for key, image in zip(keys, example.images, strict=True):
                decoded.images.append((key, *image.size()))
            new = [key for key in keys if key not in decoded.kept and key not in decoded.pixels]
            found = {key: self._get(key) for key in new}
            decoded.kept.update({k: cached for k, cached in found.items() if cached is not None})
            if any(cached is None for cached in found.values()):
                images = [image.read() for image in example.images]
                crops = model.spec.crops(image_processor, images)
                decoded.pixels.update(zip(keys, crops, strict=True))
        texts = sum(not example.images for example in examples)
        return decoded._replace(texts=texts)

    def _encode(self, model: PilotModel, decoded: _Decoded) -> Visual:
        kept, fresh = dict(decoded.kept), {}
        for key, pixels in decoded.pixels.items():
            # A previous batch may have encoded it meanwhile; the workers' order must not matter.
            features = kept[key] if key in kept else self._get(key)
            if features is None:
                fresh[key] = pixels
            else:
                kept[key] = features
        if fresh:
            rows = torch.split(torch.cat(list(fresh.values())), _ROWS_AT_A_TIME)
            encoded = torch.cat([model.encode_images(part) for part in rows])
            sizes = [len(pixels) for pixels in fresh.values()]
            kept |= dict(zip(fresh, torch.split(encoded, sizes), strict=True))
            if self.config.where != "off":
                self._put(dict(zip(fresh, torch.split(encoded.cpu(), sizes), strict=True)))
        parts = [kept[key] for key, _, _ in decoded.images]
        if self.zero_images and decoded.texts:
            parts += [self._zero_row(model)] * decoded.texts
        if not parts:
            return Visual(torch.empty(0, *feature_size(model.llava.config)), ())
        shapes = (ImageShape(len(kept[key]), *size) for key, *size in decoded.images)
        return Visual(_concatenate(parts, model.device), tuple(shapes))

    def _zero_row(self, model: PilotModel) -> Tensor:
        """Return H_v of pixels that are zero after normalization, (1, N, D)."""
        if self._zero is None:
            vision = model.llava.config.vision_config
            side = vision.image_size
            self._zero = model.encode_images(torch.zeros(1, vision.num_channels, side, side))
        return self._zero

    def _keys(self, model: PilotModel, image_processor: Any, example: Example) -> list[str]:
        """Return a key for each image of an example, of everything that its features depend on."""
        base = self._base(model, image_processor) if self.config.where != "off" else ""
        alone = len(example.images) == 1  # then an image may be cropped
        return [f"{base}/{image.identity()}/{alone}" for image in example.images]

    def _base(self, model: PilotModel, image_processor: Any) -> str:
        """Return the common part of all keys: vision tower, image processor and libraries."""
        used = id(model), id(image_processor)
        if used not in self._bases:
            processor = hashlib.sha256(image_processor.to_json_string().encode()).hexdigest()
            versions = f"{torch.__version__}/{transformers.__version__}/{PIL.__version__}"
            self._bases[used] = (
                f"{model.vision_identity}/{model.device.type}/{processor}/{versions}"
            )
        return self._bases[used]

    def _get(self, key: str) -> Tensor | None:
        if self.config.where == "memory":
            return _MEMORY.get(key)
        return self.folder.get(key) if self.folder is not None else None

    def _put(self, entries: dict[str, Tensor]) -> None:
        global _used_memory
        if self.folder is not None:
            self.folder.put(entries)
        elif self.config.where == "memory":
            for key, features in entries.items():
                if _used_memory + features.nbytes <= self.limit:
                    _MEMORY[key] = features.clone()  # a view would keep the whole batch
                    _used_memory += features.nbytes


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
