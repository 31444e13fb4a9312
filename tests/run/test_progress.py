"""The live output: which line for which event, whatever the file looks like at the moment."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from sample_events import AGGREGATED, CLOSED, FAILED, ROSTER, evaluated, sent, trained

from pilot_flwr.formatting import headline, human_bytes, human_seconds, plain
from pilot_flwr.run import progress
from pilot_flwr.run.events import (
    AggregationMethod,
    ExchangeRepeated,
    Resumed,
    RosterCalled,
    RosterEntry,
    parse_event,
)
from pilot_flwr.run.progress import EventTail, LineTail, Progress, ProgressPrinter


def squeezed(lines):
    return [" ".join(line.split()) for line in lines]


def test_a_round_reads_from_roster_to_duration():
    view = Progress()
    lines = []
    method = AggregationMethod("adaptive")
    mixed = {"vqa-1": {"vqa-1": 1.0}}
    for event in (
        ROSTER,
        evaluated(),
        trained(),
        replace(AGGREGATED, tasks={"vqa": ("vqa-1",)}, neighbors=mixed, method=method),
        CLOSED,
        trained(exchange=2),
    ):
        lines += view.lines(event)
    assert squeezed(lines) == [
        "",
        "Exchange 1: 2 clients, stage 1",
        "vqa-1 vqa exact_match 0.610 before, loss 1.200 (ce 1.1, difference 0.1) "
        "180 examples 6 steps 3.1 s down 640 B up 1.2 MB",
        "aggregated 2 clients in 0.2 s: averages ψ_t of 1 client; mixes 1 Θ_l, each with 0 others",
        "exchange 1 of 4 done in 1 min 20 s",
        "",
        "Exchange 2",
        "vqa-1 vqa loss 1.200 (ce 1.1, difference 0.1) 180 examples 6 steps 3.1 s "
        "down 640 B up 1.2 MB",
    ]


def test_columns_are_aligned_to_the_longest_client_and_task():
    view = Progress()
    view.lines(ROSTER)
    first = view.lines(trained())[-1]
    second = view.lines(trained(client="captioning-0", task="captioning"))[-1]
    assert first.index("loss") == second.index("loss")


def test_the_score_of_an_incoming_model_waits_for_its_clients_training_line():
    view = Progress()
    view.lines(replace(ROSTER, exchange=2))
    assert view.lines(evaluated(exchange=1)) == []
    other = view.lines(trained(exchange=2, client="vqa-0"))
    assert "before" not in other[0]
    assert "exact_match 0.610 before," in view.lines(trained(exchange=2))[0]
    assert "before" not in view.lines(trained(exchange=2))[0]


def test_the_last_scores_have_lines_of_their_own():
    view = Progress()
    view.lines(replace(ROSTER, exchange=2))
    (line,) = view.lines(evaluated(exchange=2))
    assert "exact_match 0.610   after exchange 2" in line


def test_scores_before_any_roster_stand_under_their_own_heading():
    assert Progress().lines(evaluated())[:2] == ["", "Before training"]


def test_clients_in_different_stages_are_announced():
    clients = tuple(RosterEntry(name, "vqa", 9, stage) for name, stage in (("a", 2), ("b", 1)))
    lines = Progress().lines(RosterCalled(exchange=3, clients=clients))
    assert lines[-1] == "Exchange 3: 2 clients, stage 1 and 2"


def test_a_failure_names_client_phase_and_reason():
    event = replace(FAILED, exchange=2, reason="x\ny")
    assert squeezed(Progress().lines(event))[-1] == "vqa-1 FAILED in train: x"


def test_a_loss_that_is_no_number_is_seen_and_a_private_one_says_what_it_cost():
    odd = trained(losses={"total": float("nan")})
    assert "loss nan" in Progress().lines(parse_event(json.dumps(odd.to_dict())))[-1]
    private = trained(losses={"total": None, "ce": None}, epsilon=1.5, delta=1e-5, releases=1)
    assert "ε 1.5 at δ 1e-05, loss withheld" in Progress().lines(private)[-1]


def test_an_unknown_kind_prints_nothing():
    assert Progress().lines(parse_event('{"event": "new kind", "round": 1}')) == []
    assert Progress().lines(sent()) == []


def test_the_tail_waits_for_whole_lines_and_counts_unreadable_ones(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tail = EventTail(path)
    assert tail.read() == []
    line = json.dumps(CLOSED.to_dict()).encode() + b"\n"
    path.write_bytes(line + line[:9])
    assert tail.read() == [CLOSED]
    assert tail.read() == []
    with path.open("ab") as stream:
        stream.write(line[9:] + b'not json\n[1]\n\n{"event": "round"}\n' + line)
    assert tail.read() == [CLOSED, CLOSED]
    assert tail.unreadable == 3


def test_the_narrator_prints_what_is_new_then_signs_of_life(tmp_path: Path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "flower.log"
    out: list[str] = []
    narrator = ProgressPrinter(metrics, log, out.append)
    metrics.write_text(json.dumps(evaluated().to_dict()) + "\nbroken\n")
    log.write_text("\x1b[92mINFO\x1b[0m: hello\n")
    narrator.show()
    assert out[0] == "INFO: hello"
    assert len(out) == 4
    clock[0] = 59.0
    narrator.show()
    assert len(out) == 4
    clock[0] = 61.0
    narrator.show()
    assert out[4] == "  ... running, nothing new for 1 min 1 s"
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


def test_a_resumed_run_says_where_it_resumes_and_what_it_passed_over():
    progress = Progress()
    assert progress.lines(Resumed(exchange=0, attempt=1)) == ["", "Resumed from the beginning"]
    torn = Resumed(exchange=2, attempt=2, passed_over=("round-0003 is \x1b[31mtorn",))
    assert progress.lines(torn) == [
        "",
        "Resumed after exchange 2",
        "  not usable: round-0003 is torn",
    ]
    assert progress.lines(replace(ROSTER, exchange=3))[1].startswith("Exchange 3: 2 clients")


def test_a_repeated_exchange_has_its_heading_again():
    progress = Progress()
    progress.lines(ROSTER)
    assert progress.lines(ROSTER) == []
    repeated = ExchangeRepeated(exchange=1, reason="1 of 2 came.", undone=1)
    assert progress.lines(repeated) == ["  1 of 2 came. Waiting; the exchange is repeated."]
    assert progress.lines(ROSTER)[1].startswith("Exchange 1")


def test_only_the_resumed_part_is_shown_whatever_becomes_of_the_file(tmp_path):
    """The ServerApp puts a shorter file in its place while it is being read."""

    def line(event):
        return json.dumps(event.to_dict()) + "\n"

    path, shown = tmp_path / "metrics.jsonl", []
    old = [line(replace(CLOSED, exchange=n, exchanges=9)) for n in range(1, 9)]
    path.write_text("".join(old))
    narrator = ProgressPrinter(path, None, shown.append)
    narrator.begin_with("77")
    narrator.show()
    new = tmp_path / "new"
    resumed = [line(Resumed(exchange=1, attempt=1, flower_run=run)) for run in ("7", "77")]
    new.write_text("".join([old[0], *resumed, old[1]]))
    os.replace(new, path)
    narrator.show()
    with path.open("a") as file:
        file.write(old[2])
    narrator.finish()
    assert [line for line in shown if line] == [
        "Resumed after exchange 1",
        "Exchange 2",
        "  exchange 2 of 9 done in 1 min 20 s",
        "Exchange 3",
        "  exchange 3 of 9 done in 1 min 20 s",
    ]
