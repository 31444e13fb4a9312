"""One client's data for training and evaluation: examples, collator, feature encoder."""

import contextlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pilot_flwr.client.node import Site
from pilot_flwr.client.training import Encoder
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import SiteFiles, Split
from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import (
    Client,
    PooledExamples,
    check_references,
    client_examples,
    federation_clients,
    padding_colour,
    task_metric,
    trains_pooled,
)
from pilot_flwr.data.validation import WholeImages, usable
from pilot_flwr.errors import DataError
from pilot_flwr.model.checkpoints import user_cache
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.feature_folder import FeatureFolder
from pilot_flwr.model.loading import load_processor, loaded_model, make_collator
from pilot_flwr.model.pilot_model import PilotModel

SESSION_LOCK = ".turn.lock"
"""File in a client's state folder: one session at a time, as each replaces the state."""


class ClientData:
    """One client's data for one model, in one session.

    `folder` caches the numbers of the usable rows, `features` visual features. `files` are a real
    site's; a simulated client reads the files that the run's configuration names.
    """

    def __init__(
        self,
        client: Client,
        config: PilotConfig,
        model: PilotModel,
        *,
        folder: Path,
        files: SiteFiles | None = None,
        features: FeatureFolder | None = None,
        progress: Callable[[str], None],
    ) -> None:
        self.client, self.config, self.model = client, config, model
        self.folder, self.files, self.features = folder, files, features
        self.progress = progress
        self.metric = task_metric(config.data, client.task)
        self.processor = load_processor(config.model.path, config.model.revision)
        self.collator = make_collator(
            config.model,
            self.processor,
            max_length=config.train.max_length,
            cut=config.train.over_long == "cut",
        )

    def examples(self, split: Split) -> Sequence[Example]:
        """Return the usable examples of a split; a pooled run trains on those of all clients."""
        if split == "train" and trains_pooled(self.config.strategy, self.client):
            clients = federation_clients(self.config.data)
            return PooledExamples({c.id: self._examples(c, split) for c in clients})
        return self._examples(self.client, split)

    def instances(self) -> list[Example]:
        """Return the training examples that weight the model's personal LoRA for every question.

        They are drawn once for the run, from those whose prompt is not cut. Other models have none.
        """
        personal = self.config.train.personal
        if self.model.share is None or not personal.by_question:
            return []
        examples = self.examples("train")
        seed = zlib.crc32(f"{self.config.seed}/{self.client.id}/instances".encode())
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        found: list[Example] = []
        for index in order.tolist():
            example = examples[index]
            with contextlib.suppress(DataError):  # `train.over_long=cut` allows longer prompts
                self.collator.prompt(example)
                found.append(example)
            if len(found) == personal.instances:
                break
        if not found:
            raise DataError(
                f"No training example of client {self.client.id!r} has a prompt of at most "
                f"`train.max_length={self.config.train.max_length}` tokens, which "
                "`train.personal.weighting=similarity` needs."
            )
        return found

    def encoder(self, split: Split) -> Encoder:
        """Return a cached function from batches of examples to their visual features."""
        cache = FeatureCache(
            self.config.model.feature_cache,
            self.features,
            zero_images=split == "train" and self.config.train.text_only == "zero_image",
        )
        workers = self.config.data.workers
        return lambda parts: cache.stream(self.model, self.processor, parts, workers=workers)

    def _examples(self, client: Client, split: Split) -> Sequence[Example]:
        data = self.config.data
        examples = client_examples(
            data,
            client,
            split,
            seed=self.config.seed,
            files=self.files,
            background=padding_colour(data, self.processor.image_processor),
        )
        metric = task_metric(data, client.task)

        def check(example: Example) -> None:
            if split == "train":
                self.collator.tokenize(example)
            else:
                self.collator.prompt(example)
                check_references(metric, example)

        return usable(
            examples,
            name=f"{split} split of client {client.id!r}",
            check=check,
            allowed=data.allowed_broken,
            settings=f"{split}/{self._longest()}/{data.check_images}/{self.config.model}/{metric}",
            folder=self.folder / "checked",
            progress=self.progress,
            images=WholeImages(data.workers) if data.check_images == "decode" else None,
        )

    def _longest(self) -> str:
        """Return the settings of long examples, for the cache of checked rows."""
        train = self.config.train
        return f"{train.max_length}" + ("/cut" if train.over_long == "cut" else "")


def open_client_data(
    site: Site, config: PilotConfig, device: torch.device, progress: Callable[[str], None]
) -> ClientData:
    """Return the client's data, for this process's base model on `device`."""
    model = loaded_model(
        config.model,
        reduction=config.train.difference_loss.reduction,
        balance_reduction=config.train.balance_loss.reduction,
        device=device,
    )
    return ClientData(
        site.client,
        config,
        model,
        folder=site.state_folder,
        files=site.files,
        features=_features(site, config, progress),
        progress=progress,
    )


def _features(
    site: Site, config: PilotConfig, progress: Callable[[str], None]
) -> FeatureFolder | None:
    """Open the feature cache on disk: the site's or, in a simulation, the user's.

    Runs share it. Entries used since this run's first session, dated by its session locks, are
    never pruned.
    """
    cache = config.model.feature_cache
    if cache.where != "disk":
        return None
    runs = site.state_folder.parent
    if site.flower_run:
        folder, locks = runs, [site.state_folder / SESSION_LOCK]
    else:  # all clients of this run
        folder, locks = user_cache(), [*runs.glob(f"*/{SESSION_LOCK}")]
    return FeatureFolder(
        folder / "features",
        limit=int(cache.max_gib * 2**30),
        since=min(lock.stat().st_mtime_ns for lock in locks),
        progress=progress,
    )
