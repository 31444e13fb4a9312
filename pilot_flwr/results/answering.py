"""Ask a model that has been put together: conversations in, answers out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from pilot_flwr.client.evaluation import answer
from pilot_flwr.data.examples import Example
from pilot_flwr.model.base import load_processor, make_collator
from pilot_flwr.model.features import FeatureCache
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.plan import out_of_memory_explained
from pilot_flwr.settings.model import FeatureCacheConfig
from pilot_flwr.settings.pilot import PilotConfig


class _Pieces(transformers.TextStreamer):  # type: ignore[misc]
    """Hands on text as soon as it is sure that the next token does not change it."""

    def __init__(self, tokenizer: Any, out: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.out(text)


class Answerer:
    """Answers conversations as the run's evaluation does: greedily, in its precision.

    Parameters
    ----------
    config : PilotConfig
        The run's.
    model : PilotModel
        With all states loaded.
    keep : str
        If not empty, features of images are kept in memory under this name, by example id.
    """

    def __init__(self, config: PilotConfig, model: PilotModel, *, keep: str = "") -> None:
        self.config, self.model = config, model
        self.processor = load_processor(config.model.path, config.model.revision)
        self.collator = make_collator(
            config.model, self.processor, model.llava.config, max_length=config.train.max_length
        )
        cache = FeatureCacheConfig(where="memory" if keep else "off")
        self._cache = FeatureCache(cache, namespace=keep, folder=Path())

    def __call__(
        self,
        examples: Sequence[Example],
        *,
        max_new_tokens: int = 0,
        progress: Callable[[int], None] = lambda done: None,
        piece: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Return the answer to the last question of every example.

        Parameters
        ----------
        examples : sequence of Example
            Their last turn is not read.
        max_new_tokens : int
            Longest answer in tokens; 0 takes `evaluation.max_new_tokens`.
        progress : callable
            Gets the number of answers after every batch.
        piece : callable, optional
            Gets the answer's text in pieces, as it comes; for a single example.

        Raises
        ------
        TrainingError
            The device ran out of memory.
        DataError
            An image cannot be read, or an example is longer than `train.max_length`.
        """
        evaluation = self.config.evaluation
        if max_new_tokens:
            evaluation = replace(evaluation, max_new_tokens=max_new_tokens)
        image_processor, workers = self.processor.image_processor, self.config.data.workers
        with out_of_memory_explained(self.config, self.model.stage):
            return answer(
                self.model,
                examples,
                collator=self.collator,
                encode=lambda parts: self._cache.stream(
                    self.model, image_processor, parts, workers=workers
                ),
                config=evaluation,
                autocast_choice=self.config.train.autocast,
                progress=progress,
                streamer=None if piece is None else _Pieces(self.processor.tokenizer, piece),
            ).texts

    def end_token_ids(self) -> list[int]:
        """Return the tokens that end an answer: the template's and the checkpoint's own."""
        own = self.model.llava.generation_config.eos_token_id
        ends = {own} if isinstance(own, int) else set(own or ())
        return sorted({int(end) for end in ends} | {self.collator.end_token_id()})
