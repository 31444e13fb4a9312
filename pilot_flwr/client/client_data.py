"""One client's data, tokenizer and feature cache, as a turn needs them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.client.evaluation import evaluate
from pilot_flwr.client.node import Site
from pilot_flwr.client.training import Encoder, Proximal, sent_parameters, train
from pilot_flwr.config.schema import DittoConfig, PilotConfig
from pilot_flwr.data.client_files import Split
from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import (
    Client,
    PooledExamples,
    check_references,
    client_examples,
    federation_clients,
    is_pooling,
    padding_colour,
    task_metric,
)
from pilot_flwr.data.validation import WholeImages, usable
from pilot_flwr.model.base import load_processor, make_collator
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import EvaluationResult, TrainingResult


class Kit:
    """The client's data, tokenizer and feature cache, made once per turn."""

    def __init__(
        self,
        site: Site,
        config: PilotConfig,
        model: PilotModel,
        progress: Callable[[str], None],
    ) -> None:
        self.site, self.config, self.model, self.progress = site, config, model, progress
        self.sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
        self.processor = load_processor(config.model.path, config.model.revision)
        self.collator = make_collator(
            config.model, self.processor, model.llava.config, max_length=config.train.max_length
        )

    def train(self, generator: torch.Generator) -> TrainingResult:
        """Train on the client's training split, from where the model is; if pooled, on all."""
        weight = self.config.train.proximal_weight
        sent = sent_parameters(self.model, self.sharing) if weight > 0 else []
        return self.fit(generator, Proximal(sent, weight) if sent else None)

    def fit(self, generator: torch.Generator, proximal: Proximal | None) -> TrainingResult:
        """Train as `train`, with a proximal term or without one; see `pilot_flwr.client.training`."""
        config = self.config.train
        if config.ditto.enabled:  # half of them for each of two models
            config = replace(config, epochs=config.epochs // 2, ditto=DittoConfig())
        return train(
            self.model,
            self.examples("train"),
            collator=self.collator,
            encode=self._encoder("train"),
            config=config,
            generator=generator,
            progress=self.progress,
            proximal=proximal,
        )

    def evaluate(self) -> EvaluationResult:
        """Evaluate on the client's test split."""
        return evaluate(
            self.model,
            self.examples("test"),
            collator=self.collator,
            encode=self._encoder("test"),
            metric=task_metric(self.config.data, self.site.client.task),
            config=self.config.evaluation,
            autocast_choice=self.config.train.autocast,
        )

    def examples(self, split: Split) -> Sequence[Example]:
        """Return the examples of a split that can be used; see `pilot_flwr.data.validation`.

        Those to train on are of all clients if the run is pooled and this is the one that trains.
        """
        if split == "train" and is_pooling(self.config.strategy, self.site.client):
            clients = federation_clients(self.config.data)
            return PooledExamples({c.id: self._examples(c, split) for c in clients})
        return self._examples(self.site.client, split)

    def _examples(self, client: Client, split: Split) -> Sequence[Example]:
        data = self.config.data
        examples = client_examples(
            data,
            client,
            split,
            seed=self.config.seed,
            files=self.site.files,
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
            settings=f"{split}/{self.config.train.max_length}/{data.check_images}"
            f"/{self.config.model}/{metric}",
            folder=self.site.state_folder / "checked",
            progress=self.progress,
            images=WholeImages(data.workers) if data.check_images == "decode" else None,
        )

    def _encoder(self, split: Split) -> Encoder:
        model, data = self.config.model, (self.config.seed, self.config.data)
        base = f"{model.path}/{model.revision}/{model.dtype}"
        cache = FeatureCache(
            model.feature_cache,
            namespace=f"{base}/{data}/{self.site.client.id}/{split}",
            folder=self.site.state_folder / "features",
            base=base,
        )
        processor, workers = self.processor.image_processor, self.config.data.workers
        return lambda parts: cache.stream(self.model, processor, parts, workers=workers)
