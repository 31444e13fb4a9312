"""Visual features of the frozen vision tower, computed once per image and kept.

The tower is frozen, so H_v of an image never changes within a run. Features are kept in
memory (shared by all turns of a process) or on the client's disk, up to a bound; what does
not fit is encoded again. Nothing is evicted: training walks through all images in every
epoch, for which a cache that keeps its first entries is the best fixed policy.

A file of the cache can always be made anew, so it is not flushed to disk as states are, and
one that cannot be read counts as absent.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pilot_flwr.data.examples import Example
from pilot_flwr.model_settings import FeatureCacheConfig
from pilot_flwr.models import PilotModel

_MEMORY: dict[str, Tensor] = {}
_used_memory = 0


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
    """

    def __init__(self, config: FeatureCacheConfig, *, namespace: str, folder: Path) -> None:
        self.config = config
        self.namespace = namespace
        self.folder = folder
        self.limit = int(config.max_gib * 2**30)
        self._used_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    def encode(
        self, model: PilotModel, image_processor: Any, examples: Sequence[Example]
    ) -> Tensor:
        """Return H_v of the examples' images, shape (B, N, D), encoding only what is not kept."""
        keys = [f"{self.namespace}/{example.id}" for example in examples]
        found = {key: kept for key in keys if (kept := self._get(key)) is not None}
        absent = {k: e for k, e in zip(keys, examples, strict=True) if k not in found}
        if absent:
            images = [example.images[0].read() for example in absent.values()]
            pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
            for key, features in zip(absent, model.encode_images(pixels).cpu(), strict=True):
                found[key] = features.clone()
                self._put(key, found[key])
        return torch.stack([found[key] for key in keys])

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
        if self.config.where == "memory" and _used_memory + features.nbytes <= self.limit:
            _MEMORY[key] = features
            _used_memory += features.nbytes
        elif self.config.where == "disk" and self._used_disk + features.nbytes <= self.limit:
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                save_file({"features": features}, temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._used_disk += path.stat().st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
