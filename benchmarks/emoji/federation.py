"""Write the emoji federations: which client has which house, task and concepts.

    python benchmarks/emoji/federation.py --out outputs/emoji       # seeds 0 to 4 and 100 to 103

A house is an emoji vendor, which determines the style of a client's pictures; the task determines
its questions and answers; a concept is the object that a picture shows. A client trains on some
concepts in one house's drawings and is tested, in that house, on others, of three kinds: another
client of its task has the same drawing (``same``), or only drawings of other houses
(``other_house``), or only clients of other tasks have the concept (``other_task``). A row's id
begins with its kind.

Concepts are divided once, for all seeds, into those of the base model's pretraining, and federated
ones whose rows are tested either in validation (rates, choices) or in the test split. A seed draws
which client trains on which federated concepts.
"""

import argparse
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PACK = Path(__file__).parent / "pack"
HOUSES = ("noto", "fluent", "twemoji")
"""The clients' houses; the pack also has OpenMoji, which no federation uses."""

PRETRAINING, VALIDATION = 250, 0.3
"""Number of concepts of the base's pretraining; share of the others that validation tests."""

SIZE, MOST = 200, 100
"""Training concepts of a client; maximum number of test rows of a client and kind."""

SEEDS = {"test": range(5), "validation": range(100, 104)}
"""Seeds by the split that they test."""

_DIVISION_SEED = 20261130  # the base has seen the pretraining concepts, so no run may move them


@dataclass(frozen=True)
class Concept:
    """A concept: what a picture shows."""

    key: str
    name: str
    group: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Scenario:
    """Tasks, the houses of a task's clients in turn, and whether tasks have their own questions."""

    tasks: tuple[str, ...]
    houses: tuple[str, ...]
    clients_per_task: int
    own_questions: bool = True

    def questions(self, task: str) -> tuple[str, ...]:
        """Return the wordings of a task's question."""
        return QUESTIONS[base_task(task) if self.own_questions else "name"]

    def house(self, number: int) -> str:
        """Return the house of the client with a number within its task."""
        return self.houses[number % len(self.houses)]


def base_task(task: str) -> str:
    """Return the task without its suffix: ``name`` for ``name_b``, which asks the same."""
    return task.partition("_")[0]


TASKS = ("name", "group", "describe")
SCENARIOS = {
    "houses": Scenario(TASKS[:1], HOUSES, 9),
    "tasks": Scenario(TASKS, HOUSES[:1], 3),
    "untold": Scenario(TASKS, HOUSES[:1], 3, own_questions=False),
    "both": Scenario(TASKS, HOUSES, 3),
}
"""Nine clients each: houses differ; tasks differ, with own or the same questions; both differ."""

SAME_TASKS = Scenario(("name", "name_b", "name_c"), HOUSES[:1], 3)
"""Three tasks with identical questions and answers, so that all transfer is between equals."""

QUESTIONS = {
    "name": ("What is this?", "Name it."),
    "group": ("Which group is it?", "Classify it."),
    "describe": ("Describe it.", "Write a caption."),
}
METRICS = {"name": "exact_match", "group": "exact_match", "describe": "rouge_l"}
CLOCK_FACES = {f"{code:x}" for code in range(0x1F550, 0x1F568)}
"""From one o'clock to half past twelve."""
_MOST_KEYWORDS, _COMMON = 4, 5


def read_concepts() -> list[Concept]:
    """Return the concepts of the pack, without clock faces, whose pictures hardly differ.

    A concept keeps its first four alphabetic keywords that at least five concepts have and that are
    neither its group nor in its name.
    """
    rows = json.loads((PACK / "concepts.json").read_text(encoding="utf-8"))
    rows = {key: row for key, row in rows.items() if key not in CLOCK_FACES}
    counts = Counter(word for row in rows.values() for word in row["keywords"])
    common = {word for word, count in counts.items() if count >= _COMMON and word.isalpha()}
    return [
        Concept(key, row["name"], row["group"], _keywords(row, common)) for key, row in rows.items()
    ]


def _keywords(row: Mapping[str, Any], common: set[str]) -> tuple[str, ...]:
    said = {row["group"], *row["name"].lower().split()}
    known = [word for word in row["keywords"] if word in common and word not in said]
    return tuple(known[:_MOST_KEYWORDS])


def task_of(client: str) -> str:
    """Return the task of a client's id."""
    return client.rpartition("-")[0]


def number_of(client: str) -> int:
    """Return a client's number within its task."""
    return int(client.rpartition("-")[2])


def kind_of(row: str) -> str:
    """Return the kind of a test row's id."""
    return row.partition("/")[0]


def concept_of(row: str) -> str:
    """Return the concept of a row's id."""
    return row.rpartition("/")[2]


def answer(concept: Concept, task: str) -> str:
    """Return the answer to a task's questions."""
    if base_task(task) == "describe":
        return f"{concept.name}: {', '.join((concept.group, *concept.keywords))}"
    return concept.name if base_task(task) == "name" else concept.group


@dataclass(frozen=True)
class Division:
    """The concepts of pretraining, and the federated ones by the split that tests them."""

    pretraining: list[Concept]
    federated: dict[str, list[Concept]]

    def trained(self) -> dict[str, Concept]:
        """Return the federated concepts, all of which clients may train on, by key."""
        return {c.key: c for part in self.federated.values() for c in part}


def divide() -> Division:
    """Divide the concepts, the same for every seed."""
    concepts = read_concepts()
    order = np.random.default_rng(_DIVISION_SEED).permutation(len(concepts))
    shuffled = [concepts[number] for number in order]
    others = shuffled[PRETRAINING:]
    cut = round(VALIDATION * len(others))
    return Division(shuffled[:PRETRAINING], {"validation": others[:cut], "test": others[cut:]})


@dataclass(frozen=True)
class Assignment:
    """A client's house and the concepts that it trains on."""

    house: str
    concepts: tuple[str, ...]


def draw(
    scenario: Scenario, concepts: Sequence[str], *, size: int, seed: int
) -> dict[str, list[Assignment]]:
    """Draw `size` concepts for every client, independently of the others.

    A smaller `size` gives the first concepts of a larger one.
    """
    return {
        task: [
            Assignment(
                scenario.house(client),
                tuple(_rng("concepts", seed, task, client).permutation(concepts)[:size]),
            )
            for client in range(scenario.clients_per_task)
        ]
        for task in scenario.tasks
    }


def _rng(*words: object) -> np.random.Generator:
    """Return a generator seeded with these values."""
    return np.random.default_rng(list(" ".join(map(str, words)).encode()))


def kinds(
    assignments: Mapping[str, Sequence[Assignment]], task: str, client: int
) -> dict[str, set[str]]:
    """Return the concepts that other clients, but not this one, train on, by kind."""
    own = assignments[task][client]
    same = _known(assignment for assignment in assignments[task] if assignment.house == own.house)
    task_knows = _known(assignments[task])
    others = _known(one for name, found in assignments.items() if name != task for one in found)
    return {
        "same": same - set(own.concepts),
        "other_house": task_knows - same,
        "other_task": others - task_knows,
    }


def _known(assignments: Iterable[Assignment]) -> set[str]:
    return {concept for assignment in assignments for concept in assignment.concepts}


def train_rows(
    scenario: Scenario,
    assignment: Assignment,
    task: str,
    concepts: Mapping[str, Concept],
    rng: np.random.Generator,
) -> list[Any]:
    """Return a client's training rows: one per concept, in one of the task's wordings."""
    questions = scenario.questions(task)
    return [
        _row(f"train/{key}", assignment.house, questions[int(rng.integers(2))], concepts[key], task)
        for key in assignment.concepts
    ]


def test_rows(
    scenario: Scenario,
    assignments: Mapping[str, Sequence[Assignment]],
    task: str,
    client: int,
    concepts: Mapping[str, Concept],
    *,
    tested: Iterable[str],
    most: int,
) -> list[Any]:
    """Return a client's rows of unseen concepts among `tested`, at most `most` of each kind."""
    rows = []
    house, question = assignments[task][client].house, scenario.questions(task)[0]
    for kind, found in kinds(assignments, task, client).items():
        chosen = [key for key in tested if key in found][:most]
        rows += [_row(f"{kind}/{key}", house, question, concepts[key], task) for key in chosen]
    return rows


def _row(name: str, house: str, question: str, concept: Concept, task: str) -> dict[str, Any]:
    return {
        "id": name,
        "image": f"{house}/{concept.key}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer(concept, task)},
        ],
    }


def write_federation(
    out: Path,
    name: str,
    scenario: Scenario,
    *,
    split: str,
    seed: int,
    size: int = SIZE,
    most: int = MOST,
) -> None:
    """Write the rows of every client of one federation, and its file for ``data=``."""
    division = divide()
    concepts = division.trained()
    assignments = draw(scenario, sorted(concepts), size=size, seed=seed)
    # Shuffled per seed, so that `most` drops different concepts.
    tested = [c.key for c in division.federated[split]]
    tested = list(_rng("tested", seed).permutation(tested))
    folder = out / name / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for task, clients in assignments.items():
        for client, assignment in enumerate(clients):
            files = {
                "train": train_rows(
                    scenario, assignment, task, concepts, _rng("wordings", seed, task, client)
                ),
                "test": test_rows(
                    scenario, assignments, task, client, concepts, tested=tested, most=most
                ),
            }
            for part, rows in files.items():
                text = json.dumps(rows, ensure_ascii=False, indent=0)
                _write(folder / f"{task}-{client}-{part}.json", text)
    text = yaml.safe_dump(federation_file(scenario, f"{name}/{seed}"), sort_keys=False)
    _write(out / f"{name}-{seed}.yaml", text)


def _write(path: Path, text: str) -> None:
    """Write a file if its text changes: a run refuses rows that have changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def federation_file(scenario: Scenario, folder: str) -> dict[str, Any]:
    """Return the settings of a federation whose rows are in `folder`."""
    numbers = range(scenario.clients_per_task)
    return {
        "source": "llava",
        "folder": folder,
        "tasks": list(scenario.tasks),
        "clients_per_task": scenario.clients_per_task,
        "train_examples": 0,
        "test_examples": 0,
        "partition": {"kind": "files"},
        "files": {
            task: {
                "train": [f"{task}-{n}-train.json" for n in numbers],
                "test": [f"{task}-{n}-test.json" for n in numbers],
                "images": "../../pictures",
                "metric": METRICS[base_task(task)],
            }
            for task in scenario.tasks
        },
    }


def write_pictures(folder: Path) -> None:
    """Unpack the pictures."""
    with zipfile.ZipFile(io.BytesIO((PACK / "pictures.zip").read_bytes())) as archive:
        archive.extractall(folder)


def main() -> None:
    """Write the federations of all scenarios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji"), help="folder")
    parser.add_argument("--size", type=int, default=SIZE, help="training concepts of a client")
    parser.add_argument(
        "--most", type=int, default=MOST, help="maximum number of test rows per client and kind"
    )
    for split, seeds in SEEDS.items():
        parser.add_argument(f"--{split}", type=int, nargs="*", default=seeds, help="seeds")
    options = parser.parse_args()
    write_pictures(options.out / "pictures")
    for name, scenario in SCENARIOS.items():
        for split in SEEDS:
            for seed in getattr(options, split):
                write_federation(
                    options.out,
                    name,
                    scenario,
                    split=split,
                    seed=seed,
                    size=options.size,
                    most=options.most,
                )


if __name__ == "__main__":
    main()
