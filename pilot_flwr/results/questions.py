"""A file of LLaVA rows to be answered by a model: rows may lack the answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilot_flwr.data.examples import Example
from pilot_flwr.data.image_files import mean_colour
from pilot_flwr.data.llava import LlavaExamples, Reading, to_example
from pilot_flwr.data.rows import Row, open_rows
from pilot_flwr.errors import DataError
from pilot_flwr.results.answering import Answerer
from pilot_flwr.results.runs import Run

_NO_ANSWER = {"from": "gpt", "value": "?"}  # generation starts from the turns before the last


class Questions(Sequence[Example]):
    """Rows of one file as examples, whether or not their last question has an answer.

    Parameters
    ----------
    examples : LlavaExamples
        Of one file.
    """

    def __init__(self, examples: LlavaExamples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: Any) -> Any:
        """Return one example, or those of a slice; one without an answer has a placeholder.

        Raises
        ------
        DataError
            The row cannot be used; names file and row.
        """
        if isinstance(position, slice):
            return [self[n] for n in range(*position.indices(len(self)))]
        row = dict(self.examples.row(position))
        if not has_answer(row) and isinstance(row.get("conversations"), list):
            row["conversations"] = [*row["conversations"], _NO_ANSWER]
        origin = self.examples.origin(position)
        return to_example(row, f"{position + 1}:", origin, self.examples.reading)

    def question(self, position: int) -> str:
        """Return the last question as the model gets it."""
        return str(self[position].prompt[-1].text)

    def references(self, position: int) -> list[str]:
        """Return what the last answer would be scored against; empty if the row does not say."""
        row = self.examples.row(position)
        if row.get("references") or has_answer(row):
            return list(self[position].answers)
        return []


def has_answer(row: Row) -> bool:
    """Return whether the row's last turn is an answer."""
    turns = row.get("conversations")
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and last.get("from") == "gpt"


def check_all(examples: Sequence[Example], answerer: Answerer) -> None:
    """Raise unless every example can be answered, as far as rows and image headers tell.

    So a broken row does not end the work in the middle of it.

    Raises
    ------
    DataError
        Names the first one, and counts the others.
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


def open_file(
    run: Run, task: str, answerer: Answerer, path: Path, images: Path | None, *, plain: bool = False
) -> LlavaExamples:
    """Open a file of rows as the run's data is read: prompt suffix of the task, padding.

    Parameters
    ----------
    run : Run
        Whose settings count.
    task : str
        The questions' task.
    answerer : Answerer
        Its image processor knows the colour of the padding.
    path : Path
        LLaVA JSON or JSONL.
    images : Path, optional
        Folder that image names count from.
    plain : bool
        Leave the prompt suffix out.

    Raises
    ------
    DataError
        The file cannot be read or has no rows, or the image folder is none.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"`--images` is {str(images)!r} but must be a folder.")
    pad = run.config.data.image_aspect_ratio == "pad"
    reading = Reading(
        images,
        "" if plain else run.prompt_suffix(task),
        mean_colour(answerer.processor.image_processor) if pad else None,
    )
    examples = LlavaExamples([open_rows(path)], reading)
    if not len(examples):
        raise DataError(f"{path} has no rows.")
    return examples
