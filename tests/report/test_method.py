"""What the report says of a method is what the method does."""

from dataclasses import replace

import pytest

from pilot_flwr.config.loading import load_config
from pilot_flwr.errors import ModelError
from pilot_flwr.report import matrices
from pilot_flwr.report import timeline as diagram
from pilot_flwr.run.events import Aggregated, InstructionSent, RosterCalled, Trained, select
from pilot_flwr.run.history import read_run

CLIENTS = ["vqa-0", "vqa-1", "row-0", "row-1"]
ALL = dict.fromkeys(CLIENTS, 0.25)


@pytest.fixture(scope="module")
def run(finished):
    return read_run(finished.folder.path)


def exchange(weights=None, distances=None, tasks=None, down=None):
    alike = {client: dict.fromkeys(CLIENTS, 0.5) for client in CLIENTS}
    sent = {"exchange": 1, "client": "vqa-0", "task": "vqa", "stage": 1}
    gradients = {"lora": 58_368, "own_task_adapter": 15_552}
    trained = Trained(
        **sent, examples=1, steps=1, seconds=1.0, gradients=gradients, bytes_down=0, bytes_up=1000,
        up={"lora": 1000},
    )  # fmt: skip
    return [
        InstructionSent(**sent, phase="train", down=down or {"lora": 1000}),
        trained,
        Aggregated(
            exchange=1,
            seconds=0.1,
            clients=len(CLIENTS),
            tasks={"all-tasks": CLIENTS} if tasks is None else tasks,
            neighbors=dict.fromkeys(CLIENTS, ALL) if weights is None else weights,
            distances=alike if distances is None else distances,
        ),
    ]


def of(run, overrides, **changes):
    """A run of another method, in which one exchange was seen."""
    events = [*select(run.events, RosterCalled), *exchange(**changes)]
    return replace(run, config=load_config(overrides), events=events)


def words(run):
    time_line = diagram.time_line(run)
    return " ".join([matrices.distances(run).text, matrices.mixing_weights(run).text,
                     time_line.text, time_line.panels[0].alt])  # fmt: skip


PER_TASK = {c: {o: 0.5 for o in CLIENTS if o[:3] == c[:3]} for c in CLIENTS}

ONE = {"weights": {"vqa-0": {"vqa-0": 1.0}}, "distances": {"vqa-0": {"vqa-0": 0.0}}}
ONE |= {"tasks": {"all-tasks": ["vqa-0"]}}

SAID = [
    ("strategy=pilot", {}, ["by the inverse of this distance", "mixes 4 Θ_l, each with 3 others"]),
    ("strategy=fedit", {},
     ["averages Θ_l of 4 clients", "does not use them", "All clients receive"]),
    ("strategy=fedavg_per_task", {"weights": PER_TASK},
     ["averages Θ_l per task, of 2, 2 clients", "clients of a task receive", "a task's clients"]),
    ("strategy=fedadam", {},
     ["steps by Adam: Θ_l of 4 clients", "steps by Adam: ψ_t of 4", "step of Adam towards it"]),
    ("strategy=fedsa_lora", {},
     ["averages A of Θ_l of 4", "between the matrices A of", "B stays on the client"]),
    ("strategy=ffa_lora", {}, ["averages B of Θ_l of 4", "A keeps its initial value"]),
    ("strategy=fedex_lora", {"down": {"lora": 1000, "residual": 9000}},
     ["averages Θ_l of 4 clients, the rest in R", "R the difference between", "residual R"]),
    ("strategy=ditto", {}, ["scored by its personal model v", "never sent", "averages Θ_l of 4"]),
    ("strategy=centralised", ONE,
     ["takes the pooled client's parameters", "`strategy.trained_by` is 'pooled'"]),
    ("strategy=zero_shot", {"weights": {}, "distances": {}, "tasks": {}}, ["Nothing is trained"]),
    ("strategy=local", {"weights": {}, "distances": {}, "tasks": {}}, ["The clients send no LoRA"]),
    ("strategy=pilot_auto", {}, ["the others of its group", "mixes 4 Θ_l, each with 3 others"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "changes", "said"), SAID, ids=[row[0] for row in SAID])
def test_the_sentences_are_the_methods_own(run, overrides, changes, said):
    text = words(of(run, overrides, **changes))
    assert [part for part in said if part not in text] == []
    foreign = {
        "inverse of this distance": "strategy=pilot",
        "mixes 4": "strategy=pilot",
        "Adam": "strategy=fedadam",
        "personal model v": "strategy=ditto",
        "R the difference": "strategy=fedex_lora",
        "ψ_c": "none of these exchanges",
    }
    assert [
        part for part, owner in foreign.items() if part in text and not overrides.startswith(owner)
    ] == []


def test_of_one_client_there_are_no_matrices(run):
    one = of(run, *SAID[8][:1], **SAID[8][1])
    assert not matrices.distances(one).panels and not matrices.mixing_weights(one).panels


def test_the_chosen_numbers_of_neighbours_are_a_table(run):
    three, pair = ["vqa-0", "vqa-1", "counting-0"], ["counting-0", "counting-1"]
    weights = {client: dict.fromkeys(three, 1 / 3) for client in three}
    weights["counting-1"] = dict.fromkeys(pair, 0.5)
    changes = {"weights": weights, "distances": {c: dict.fromkeys(weights, 0.5) for c in weights}}
    auto, fixed = (
        matrices.mixing_weights(of(run, f"strategy={name}", **changes)).tables
        for name in ("pilot_auto", "pilot")
    )
    assert [row[-1] for row in auto[-1].rows] == ["exchange 1", "2", "2", "2", "1"]
    assert [row[0] for row in auto[-1].rows[1:]] == [*run.task_of]
    assert [table.title for table in fixed] == [table.title for table in auto[:-1]]


def test_a_chip_says_how_much_of_the_lora_was_sent(run, make_model, monkeypatch):
    named = dict(make_model().named_parameters())
    count = {m: sum(p.numel() for n, p in named.items() if f".lora_{m}." in n) for m in "AB"}
    fedsa = of(run, "strategy=fedsa_lora")
    assert chips(fedsa)[0] == f"  A: {count['A']:,} of 58,368"
    assert sum(count.values()) == 58_368
    assert (
        chips(of(run, "strategy=fedit"))[0] == chips(of(run, "strategy=ffa_lora"))[0] == "  58,368"
    )

    def gone(*arguments, **options):
        raise ModelError("The base model is not here.")

    monkeypatch.setattr(diagram, "layout_of", gone)
    assert chips(fedsa)[0] == "  only A of 58,368"


def chips(run):
    from matplotlib.figure import Figure

    (panel,) = diagram.time_line(run).panels
    axes = Figure().add_subplot()
    panel.draw(axes)
    texts = [text.get_text() for text in axes.texts]
    return [text.split("$")[-1] for text in texts if "58,368" in text or "15,552" in text]
