"""Answer questions with a loaded model: examples, conversations and files."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from pilot_flwr.client.client_data import ClientData
from pilot_flwr.client.evaluation import answer, represent_instances
from pilot_flwr.config.model import FeatureCacheConfig
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import linked_folders
from pilot_flwr.data.examples import IMAGE_MARKER, Example, ImageSource, Turn
from pilot_flwr.data.images import ImageFile, mean_colour
from pilot_flwr.data.llava import LlavaExamples, Reading, row_id, to_example
from pilot_flwr.data.row_files import open_rows
from pilot_flwr.data.turns import UNANSWERED
from pilot_flwr.errors import ConfigError, DataError
from pilot_flwr.inference.runs import Run, Selected, load_model
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.resource_plan import out_of_memory_explained


class _Pieces(transformers.TextStreamer):  # type: ignore[misc]
    """Streams text that the next tokens cannot change any more."""

    def __init__(self, tokenizer: Any, out: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.out(text)


class Answerer:
    """Generates answers as in the run's evaluation: greedily, in the same precision.

    With `keep`, image features are cached in memory. `instances` are the training examples that
    weight a personal LoRA for every question, if any.
    """

    def __init__(
        self,
        config: PilotConfig,
        model: PilotModel,
        *,
        keep: bool = False,
        instances: Sequence[Example] = (),
    ) -> None:
        self.config, self.model, self.instances = config, model, instances
        self._known: torch.Tensor | None = None
        self.processor = load_processor(config.model.path, config.model.revision)
        self.collator = make_collator(
            config.model, self.processor, max_length=config.train.max_length
        )
        cache = FeatureCacheConfig(where="memory" if keep else "off")
        self._cache = FeatureCache(cache)

    def __call__(
        self,
        examples: Sequence[Example],
        *,
        max_new_tokens: int = 0,
        progress: Callable[[int], None] = lambda done: None,
        piece: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Answer the last question of every example.

        Parameters
        ----------
        examples : sequence of Example
            The model does not see their last turn.
        max_new_tokens : int
            Maximum length of an answer in tokens; 0 takes `evaluation.max_new_tokens`.
        progress : callable
            Called with the number of answers after every batch.
        piece : callable, optional
            Called with each piece of a single example's answer as it is generated.

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
        how: dict[str, Any] = {
            "collator": self.collator,
            "encode": functools.partial(
                self._cache.stream, self.model, self.processor, workers=self.config.data.workers
            ),
            "config": evaluation,
            "autocast_choice": self.config.train.autocast,
        }
        with out_of_memory_explained(self.config, self.model.stage):
            if self._known is None:
                self._known = represent_instances(self.model, self.instances, **how)
            return answer(
                self.model,
                examples,
                **how,
                known=self._known,
                progress=progress,
                streamer=None if piece is None else _Pieces(self.processor.tokenizer, piece),
            ).texts

    def end_token_ids(self) -> list[int]:
        """Return the tokens that end an answer, by the chat template or the checkpoint."""
        return self.model.end_tokens(self.collator.end_token_id())


def open_answerer(
    run: Run,
    selected: Selected,
    *,
    device: torch.device,
    keep: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Answerer:
    """Load a selected model to answer as in the run.

    Parameters
    ----------
    run, selected, device : Run, Selected, torch.device
        As for `pilot_flwr.inference.runs.load_model`.
    keep : bool
        Cache image features in memory.
    say : callable
        Prints a line for the user about skipped training rows.

    Raises
    ------
    ConfigError, DataError
        The model needs training examples of the client that cannot be read.
    """
    model = load_model(run, selected, device=device)
    instances: list[Example] = []
    if selected.client is not None and model.share is not None:
        with tempfile.TemporaryDirectory() as folder:
            data = ClientData(selected.client, run.config, model, folder=Path(folder), progress=say)
            try:
                instances = data.instances()
            except (ConfigError, DataError) as error:
                raise type(error)(
                    f"The personalised model of client {selected.name!r} weights its personal LoRA "
                    f"by training examples of the client, which cannot be read here: {error} "
                    "`train.personal.weighting=fixed` gives all questions the same weight; the "
                    "consensus model of its task (`--task`) needs no examples either."
                ) from None
    return Answerer(run.config, model, keep=keep, instances=instances)


class Conversation:
    """A conversation; the model sees all of it with every question.

    `suffix` is appended to every question on a new line; `pad` pads images to a square, and
    `official` reads their pixels as LLaVA's code does, as in the run's data.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        max_new_tokens: int,
        suffix: str = "",
        pad: bool = False,
        official: bool = False,
    ) -> None:
        self.answerer = answerer
        self.max_new_tokens = max_new_tokens
        self.suffix = suffix
        image_processor = answerer.processor.image_processor
        self._background, self._official = mean_colour(image_processor) if pad else None, official
        self._number = 0
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.turns: tuple[Turn, ...] = ()
        self.images: tuple[ImageSource, ...] = ()
        self._shown: tuple[ImageSource, ...] = ()
        self._number += 1

    def show(self, path: Path) -> None:
        """Attach an image to the next question; raise `DataError` if it cannot be read."""
        try:
            file = path.expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # no such user, a NUL in the name
            raise DataError(f"Image {str(path)!r} cannot be opened ({error}).") from None
        origin = f"Image {path}"
        image = ImageFile(file.parent, file.name, origin, self._background, self._official)
        image.read()
        self._shown += (image,)

    def ask(self, question: str, piece: Callable[[str], None] | None = None) -> str:
        """Add a question and its answer to the conversation; return the answer.

        Parameters
        ----------
        question : str
            Without image markers.
        piece : callable, optional
            Called with each piece of the answer as it is generated.

        Raises
        ------
        DataError
            The question is empty, has an image marker or is not valid text, or the conversation
            would exceed `train.max_length`. The conversation is then unchanged.
        """
        question = question.strip()
        if not question:
            raise DataError("The question is empty.")
        try:
            question.encode()
        except UnicodeEncodeError:  # lone surrogates: the terminal's input was not UTF-8
            raise DataError("The question is not valid UTF-8.") from None
        if IMAGE_MARKER in question:
            raise DataError(f"The question must not contain {IMAGE_MARKER}; attach the image.")
        lines = [*[IMAGE_MARKER] * len(self._shown), question, *filter(None, [self.suffix])]
        asked = (*self.turns, Turn("user", "\n".join(lines)))
        images = self.images + self._shown
        # The model does not see the last turn, whose text is generated.
        example = Example(f"conversation {self._number}", images, (*asked, Turn("assistant", "?")))
        (reply,) = self.answerer([example], max_new_tokens=self.max_new_tokens, piece=piece)
        reply = reply.strip()
        self.turns = (*asked, Turn("assistant", reply or "(no answer)"))
        self.images, self._shown = images, ()
        return reply


class Questions(Sequence[Example]):
    """Rows of one file as examples; the last question may lack an answer."""

    def __init__(self, examples: LlavaExamples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: Any) -> Any:
        """Return an example, or those of a slice; a missing answer is `UNANSWERED`."""
        if isinstance(position, slice):
            return [self[n] for n in range(*position.indices(len(self)))]
        row, origin = self.examples.row(position), self.examples.origin(position)
        reading = self.examples.reading
        return to_example(row, f"{self.row_number(position)}:", origin, reading, answered=False)

    def row_number(self, position: int) -> int:
        """Return the row's number in errors."""
        index, number = self.examples.place(position)
        return self.examples.files[index].row_number(number)

    def id(self, position: int) -> Any:
        """Return the row's id as the file has it, or None."""
        return row_id(self.examples.row(position))

    def question(self, position: int) -> str:
        """Return the last question as the model sees it."""
        return str(self[position].prompt[-1].text)

    def references(self, position: int) -> list[str]:
        """Return the reference answers to the last question, if the row has any."""
        example = self[position]
        answered = example.references or example.turns[-1] is not UNANSWERED
        return list(example.answers) if answered else []


def open_file(
    run: Run, task: str, answerer: Answerer, path: Path, images: Path | None, *, plain: bool = False
) -> LlavaExamples:
    """Open a file of rows with the run's padding and the task's prompt suffix.

    Parameters
    ----------
    run, task, answerer : Run, str, Answerer
        Their settings, prompt suffix and padding colour apply.
    path, images : Path
        The file, and the folder of its images.
    plain : bool
        Omit the prompt suffix.

    Raises
    ------
    DataError
        The file cannot be read or has no rows, or `images` is not a folder.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"`--images` is {str(images)!r} but must be a folder.")
    data = run.config.data
    pad = data.image_aspect_ratio == "pad"
    reading = Reading(
        images,
        "" if plain else run.prompt_suffix(task),
        mean_colour(answerer.processor.image_processor) if pad else None,
        data.image_reading == "official",
        linked_folders(data),
    )
    examples = LlavaExamples([open_rows(path)], reading)
    if not len(examples):
        raise DataError(f"{path} has no rows.")
    return examples


def check_all(examples: Sequence[Example], answerer: Answerer) -> None:
    """Check that all examples can be answered, so that no broken row stops the work half-way.

    Only rows and image headers are read. The `DataError` names the first broken row and counts
    the others.
    """
    errors = []
    for position in range(len(examples)):
        try:
            answerer.collator.prompt(examples[position])
        except DataError as error:
            errors.append(str(error))
    if errors:
        others = f" {len(errors) - 1} more of {len(examples)} rows are broken."
        raise DataError(errors[0] + (others if len(errors) > 1 else ""))
