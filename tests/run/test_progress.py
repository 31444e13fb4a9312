"""The live output: which line for which event, whatever the file looks like at the moment."""

import json
import os
from pathlib import Path

import pytest

from pilot_flwr.formatting import headline, human_bytes, human_seconds, plain
from pilot_flwr.run import progress
from pilot_flwr.run.progress import EventTail, LineTail, Progress, ProgressPrinter

ROSTER = {
    "event": "roster",
    "round": 1,
    "clients": [
        {"client": "captioning-0", "task": "captioning", "examples": 180, "stage": 1},
        {"client": "vqa-1", "task": "vqa", "examples": 90, "stage": 1},
    ],
}
TRAIN = {
    "event": "train",
    "round": 1,
    "stage": 1,
    "client": "vqa-1",
    "task": "vqa",
    "loss": 1.2,
    "loss_ce": 1.1,
    "loss_difference": 0.1,
    "loss_balance": 0.0,
    "loss_z": 0.0,
    "examples": 180,
    "steps": 6,
    "seconds": 3.14,
    "bytes_down": 640,
    "bytes_up": 1_234_567,
}
EVALUATE = {
    "event": "evaluate",
    "round": 0,
    "client": "vqa-1",
    "task": "vqa",
    "score": 0.61,
    "metric": "exact_match",
    "examples": 60,
    "seconds": 1.2,
}


def squeezed(lines):
    return [" ".join(line.split()) for line in lines]


def test_a_round_reads_from_roster_to_duration():
    view = Progress()
    lines = []
    for event in (
        ROSTER,
        EVALUATE,
        TRAIN,
        {"event": "aggregate", "round": 1, "seconds": 0.2, "clients": 2},
        {"event": "round", "round": 1, "exchanges": 4, "seconds": 80.4},
        {**TRAIN, "round": 2},
    ):
        lines += view.lines(event)
    assert squeezed(lines) == [
        "",
        "Exchange 1: 2 clients, stage 1",
        "vqa-1 vqa exact_match 0.610 before, loss 1.200 (ce 1.1, difference 0.1) "
        "180 examples 6 steps 3.1 s down 640 B up 1.2 MB",
        "aggregated 2 clients in 0.2 s",
        "exchange 1 of 4 done in 1 min 20 s",
        "",
        "Exchange 2",
        "vqa-1 vqa loss 1.200 (ce 1.1, difference 0.1) 180 examples 6 steps 3.1 s "
        "down 640 B up 1.2 MB",
    ]


def test_columns_are_aligned_to_the_longest_client_and_task():
    view = Progress()
    view.lines(ROSTER)
    first = view.lines(TRAIN)[-1]
    second = view.lines({**TRAIN, "client": "captioning-0", "task": "captioning"})[-1]
    assert first.index("loss") == second.index("loss")


def test_the_score_of_an_incoming_model_waits_for_its_clients_training_line():
    view = Progress()
    view.lines({**ROSTER, "round": 2})
    assert view.lines({**EVALUATE, "round": 1}) == []
    other = view.lines({**TRAIN, "round": 2, "client": "vqa-0"})
    assert "before" not in other[0]
    assert "exact_match 0.610 before," in view.lines({**TRAIN, "round": 2})[0]
    assert "before" not in view.lines({**TRAIN, "round": 2})[0]


def test_the_last_scores_have_lines_of_their_own():
    view = Progress()
    view.lines({**ROSTER, "round": 2})
    lines = view.lines({**EVALUATE, "round": 2})
    assert len(lines) == 1
    assert "exact_match 0.610   after exchange 2" in lines[0]


def test_scores_before_any_roster_stand_under_their_own_heading():
    assert Progress().lines(EVALUATE)[:2] == ["", "Before training"]


def test_clients_in_different_stages_are_announced():
    clients = [{"client": "a", "stage": 2}, {"client": "b", "stage": 1}, {"client": "c"}]
    lines = Progress().lines({"event": "roster", "round": 3, "clients": clients})
    assert lines[-1] == "Exchange 3: 3 clients, stage 1 and 2"


def test_a_failure_names_client_phase_and_reason():
    event = {"event": "failure", "round": 2, "phase": "train", "client": "vqa-1", "reason": "x\ny"}
    assert squeezed(Progress().lines(event))[-1] == "vqa-1 FAILED in train: x"


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": "new kind", "round": 1},
        {"event": None},
        {"event": "round"},
        {"event": "round", "round": float("nan")},
    ],
)
def test_an_unknown_event_prints_nothing(event):
    assert Progress().lines(event) == []


@pytest.mark.parametrize("kind", ["roster", "evaluate", "train", "failure", "aggregate", "round"])
@pytest.mark.parametrize("value", [None, "text", [], {}, True, float("nan"), -1])
def test_odd_values_never_raise(kind, value):
    keys = {*TRAIN, *EVALUATE, *ROSTER, "phase", "reason", "exchanges"} - {"event"}
    Progress().lines({"event": kind})
    Progress().lines({"event": kind, **dict.fromkeys(keys, value)})
    Progress().lines({"event": kind, "round": 1, "clients": [value, {"client": value}]})


def test_the_tail_waits_for_whole_lines_and_counts_unreadable_ones(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tail = EventTail(path)
    assert tail.read() == []
    path.write_bytes(b'{"event": "a"}\n{"eve')
    assert tail.read() == [{"event": "a"}]
    assert tail.read() == []
    with path.open("ab") as stream:
        stream.write('nt": "ü"}\nnot json\n[1]\n\n{"event": "c"}\n'.encode())
    assert tail.read() == [{"event": "ü"}, {"event": "c"}]
    assert tail.unreadable == 2


def test_the_narrator_prints_what_is_new_then_signs_of_life(tmp_path: Path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "flower.log"
    out: list[str] = []
    narrator = ProgressPrinter(metrics, log, out.append)
    metrics.write_text(json.dumps(EVALUATE) + "\nbroken\n")
    log.write_text("\x1b[92mINFO\x1b[0m: hello\n")
    narrator.show()
    assert out[0] == "INFO: hello"
    assert len(out) == 4
    clock[0] = 59.0
    narrator.show()
    assert len(out) == 4
    clock[0] = 61.0
    narrator.show()
    assert out[4] == "  ... running, no news for 1 min 1 s"
    clock[0] = 119.0
    narrator.finish()
    assert out[5:] == ["  1 line of metrics.jsonl unreadable"]


FLOWER_REASON = """<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[3mray\x1b[0m
  File "/x/client_app.py", line 161, in __call__
    return self._registered_funcs[full_name](message, context)
ValueError: the client is not amused

The above exception was the direct cause of the following exception:

\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=4522)
  File "/x/ray_actor.py", line 65, in run
    raise ClientAppException(str(ex)) from ex
flwr.clientapp.client_app.ClientAppException:
Exception ClientAppException occurred. Message: the client is not amused'>"""


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (FLOWER_REASON, "ValueError: the client is not amused"),
        (
            "<class 'ray.exceptions.ActorDiedError'>:<'The actor died.\n\tclass_name: C\n'>",
            "The actor died.",
        ),
        ('  File "/x.py", line 1\n    assert x\nAssertionError', "AssertionError"),
        (
            'File "x"\npkg.mod.DataError: row 3: no image\nmore',
            "pkg.mod.DataError: row 3: no image",
        ),
        ('File "x"\nsomething else', "something else"),
        ("\n\nfirst\nsecond", "first"),
        ("", "no reason given"),
    ],
)
def test_the_headline_of_a_reason(reason, line):
    assert headline(reason) == line


def test_numbers_for_people():
    assert [human_seconds(s) for s in (0.04, 59.94, 125, 3780)] == [
        "0.0 s",
        "59.9 s",
        "2 min 5 s",
        "1 h 3 min",
    ]
    assert [human_bytes(b) for b in (0, 999, 1234, 1_234_567, 7.5e9)] == [
        "0 B",
        "999 B",
        "1.2 kB",
        "1.2 MB",
        "7.5 GB",
    ]
    assert plain("a\x1b[92mb\x1b[0mc") == "abc"


def test_a_missing_file_is_an_empty_one(tmp_path: Path):
    assert LineTail(tmp_path / "absent").read() == []


def test_a_resumed_run_says_where_it_goes_on_and_what_it_passed_over():
    progress = Progress()
    assert progress.lines({"event": "resume", "round": 0, "passed_over": []}) == [
        "",
        "Resumed from the beginning",
    ]
    torn = {"event": "resume", "round": 2, "passed_over": ["round-0003 is \x1b[31mtorn"]}
    assert progress.lines(torn) == [
        "",
        "Resumed after exchange 2",
        "  passed over: round-0003 is torn",
    ]
    roster = {"event": "roster", "round": 3, "clients": [{"client": "a", "stage": 2}]}
    assert progress.lines(roster)[1].startswith("Exchange 3: 1 client")


def test_a_repeated_exchange_has_its_heading_again():
    progress = Progress()
    roster = {"event": "roster", "round": 1, "clients": []}
    progress.lines(roster)
    assert progress.lines(roster) == []
    (line,) = progress.lines({"event": "repeat", "round": 1, "reason": "1 of 2 came."})
    assert line == "  1 of 2 came. Waiting; the exchange is repeated."
    assert progress.lines(roster)[1].startswith("Exchange 1")


def test_only_the_resumed_part_is_shown_whatever_becomes_of_the_file(tmp_path):
    """The ServerApp puts a shorter file in its place while it is being read."""
    path, shown = tmp_path / "metrics.jsonl", []
    old = [json.dumps({"event": "round", "round": n, "exchanges": 9}) + "\n" for n in range(1, 9)]
    path.write_text("".join(old))
    narrator = ProgressPrinter(path, None, shown.append)
    narrator.begin_with("77")
    narrator.show()
    new = tmp_path / "new"
    earlier = json.dumps({"event": "resume", "round": 1, "flower_run": "7"}) + "\n"
    new.write_text(
        old[0]
        + earlier
        + json.dumps({"event": "resume", "round": 1, "flower_run": "77"})
        + "\n"
        + old[1]
    )
    os.replace(new, path)
    narrator.show()
    with path.open("a") as file:
        file.write(old[2])
    narrator.finish()
    assert [line for line in shown if line] == [
        "Resumed after exchange 1",
        "Exchange 2",
        "  exchange 2 of 9 done",
        "Exchange 3",
        "  exchange 3 of 9 done",
    ]
