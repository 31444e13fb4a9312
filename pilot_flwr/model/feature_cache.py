"""Visual features of the frozen vision tower, computed once per image and kept.

The tower is frozen, so H_v of an image never changes within a run. Features are kept in
memory (shared by all turns of a process) or on the client's disk, up to a bound; what does
not fit is encoded again. Nothing is evicted: training walks through all images in every
epoch, for which a cache that keeps its first entries is the best fixed policy. Images that have
to be encoded are read and decoded by threads while the model is busy with the batch before.

A file of the cache can always be made anew, so it is not flushed to disk as states are, and
one that cannot be read counts as absent.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pilot_flwr.config.model import FeatureCacheConfig
from pilot_flwr.data.examples import Example
from pilot_flwr.model.architectures import ImageShape, Visual, feature_size
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.run.atomic import write_safetensors

_ROWS_AT_A_TIME = 32
"""Crops that the vision tower sees at once, which bounds its memory."""

_MEMORY: dict[str, Tensor] = {}
_used_memory = 0


class _Decoded(NamedTuple):
    """What a worker has read of a batch.

    Attributes
    ----------
    images : list
        Key, height and width of every image, in the batch's order.
    kept, pixels : dict
        Features (rows, N, D) of the images that have them, pixels of the others, by key.
    """

    images: list[tuple[str, int, int]]
    kept: dict[str, Tensor]
    pixels: dict[str, Tensor]


class FeatureCache:
    """H_v of one client's images.

    Parameters
    ----------
    config : FeatureCacheConfig
        Where features are kept, and how much.
    namespace : str
        Tells these features from others in the same process or folder: all that they depend
        on besides an example's id, which must be unique in it.
    folder : Path
        Used if features are kept on disk.
    base : str, optional
        The same for images that have an identity, which many examples may share: all that
        features depend on besides the image, so the vision tower. By default `namespace`.
    """

    def __init__(
        self, config: FeatureCacheConfig, *, namespace: str, folder: Path, base: str | None = None
    ) -> None:
        self.config = config
        self.namespace = namespace
        self.base = namespace if base is None else base
        self.folder = folder
        self.limit = int(config.max_gib * 2**30)
        self._used_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    def encode(
        self, model: PilotModel, image_processor: Any, examples: Sequence[Example]
    ) -> Visual:
        """Return H_v of the examples' images, encoding only what is not kept."""
        return self._encode(model, self._decode(model, image_processor, examples))

    def stream(
        self,
        model: PilotModel,
        image_processor: Any,
        parts: Iterable[Sequence[Example]],
        *,
        workers: int,
    ) -> Iterator[Visual]:
        """Yield H_v of one batch of examples after the other.

        Parameters
        ----------
        model : PilotModel
            Encodes what is not kept, in the caller's thread.
        image_processor
            Makes pixels of images, in the workers.
        parts : iterable of sequence of Example
            The batches, taken from it ahead of time.
        workers : int
            Threads that decode images, one batch each; 0 decodes in the caller's thread.
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
        """Read the examples' features where they are kept, else their images' pixels, once each."""
        decoded = _Decoded([], {}, {})
        for example in examples:
            keys = self._keys(example)
            for key, image in zip(keys, example.images, strict=True):
                decoded.images.append((key, *image.size()))
            absent = [key for key in keys if key not in decoded.kept and key not in decoded.pixels]
            found = {key: self._get(key) for key in absent}
            decoded.kept.update(
                {k: features for k, features in found.items() if features is not None}
            )
            if any(features is None for features in found.values()):
                images = [image.read() for image in example.images]
                crops = model.spec.crops(image_processor, images)
                decoded.pixels.update(zip(keys, crops, strict=True))
        return decoded

    def _encode(self, model: PilotModel, decoded: _Decoded) -> Visual:
        kept, fresh = dict(decoded.kept), {}
        for key, pixels in decoded.pixels.items():
            # What a batch before has encoded meanwhile is taken from there: which worker was
            # faster must not show in the result.
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
                for key, features in zip(fresh, torch.split(encoded.cpu(), sizes), strict=True):
                    self._put(key, features)
        if not decoded.images:
            return Visual(torch.empty(0, *feature_size(model.llava.config)), ())
        features = _together([kept[key] for key, _, _ in decoded.images], model.device)
        shapes = (ImageShape(len(kept[key]), *size) for key, *size in decoded.images)
        return Visual(features, tuple(shapes))

    def _keys(self, example: Example) -> list[str]:
        alone = len(example.images) == 1  # which decides about an image's crops
        identities = [image.identity() for image in example.images]
        return [
            f"{self.namespace}/{example.id}/{number}"
            if identity is None
            else f"{self.base}/{identity}/{alone}"
            for number, identity in enumerate(identities)
        ]

    def _get(self, key: str) -> Tensor | None:
        if self.config.where == "memory":
            return _MEMORY.get(key)
        if self.config.where == "disk" and (path := self._path(key)).exists():
            try:
                features: Tensor = load_file(path)["features"]
            except SafetensorError:  # torn by a crash
                return None
            return features
        return None

    def _put(self, key: str, features: Tensor) -> None:
        global _used_memory
        features = features.clone()  # a view would keep the whole batch
        if self.config.where == "memory" and _used_memory + features.nbytes <= self.limit:
            _MEMORY[key] = features
            _used_memory += features.nbytes
        elif self.config.where == "disk" and self._used_disk + features.nbytes <= self.limit:
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                write_safetensors(temporary, {"features": features})
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._used_disk += path.stat().st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def forget_features() -> None:
    """Free all features that this process keeps in memory: no run needs those of another."""
    global _used_memory
    _MEMORY.clear()
    _used_memory = 0


def _together(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Concatenate on `device`; what is all on the host goes there in one copy."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return torch.cat(list(tensors)).to(device)
    return torch.cat([tensor.to(device) for tensor in tensors])
