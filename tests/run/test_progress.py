"""The live output: which line for which event, whatever the file looks like at the moment."""

import itertools
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
    EvaluationClosed,
    ExchangeRepeated,
    LoraMixing,
    Resumed,
    RosterCalled,
    RosterEntry,
    parse_event,
)
from pilot_flwr.run.progress import EventTail, LineTail, Progress, ProgressPrinter
from pilot_flwr.run.tables import MOST_CLIENTS


def squeezed(lines):
    return [" ".join(line.split()) for line in lines]


def test_a_round_reads_from_roster_to_duration():
    view = Progress()
    lines = []
    method = AggregationMethod("adaptive")
    mixed = LoraMixing(1, 0, 0, (1,))
    for event in (
        ROSTER,
        evaluated(),
        trained(),
        replace(AGGREGATED, tasks={"vqa": ("vqa-1",)}, mixing=mixed, method=method),
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


def crowd(count, exchange=1, **changes):
    """The roster of many clients and what each of them reports; seconds grow with the number."""
    names = [f"{'vqa' if k % 2 else 'ocr'}-{k}" for k in range(count)]
    roster = RosterCalled(
        exchange=exchange, clients=tuple(RosterEntry(n, n[:3], 9, 1) for n in names)
    )
    replies = [
        trained(
            exchange=exchange, client=name, task=name[:3], losses={"total": 1 + k / 100},
            session_seconds=1.0 + (k >= count - 7) * (k + 1), elapsed=1.0 * k, **changes,
        )
        for k, name in enumerate(names)
    ]  # fmt: skip
    return roster, replies


def test_of_many_clients_there_are_tenths_and_a_line_per_task():
    roster, replies = crowd(100)
    view, lines = Progress(), []
    failed = [replace(FAILED, client=e.client, reason="x\ny") for e in replies[:8]]
    for event in (roster, *failed, *replies[8:], AGGREGATED, CLOSED):
        lines += view.lines(event)
    told = squeezed(lines)
    assert told[:3] == [
        "",
        "Exchange 1: 100 clients, stage 1",
        "█░░░░░░░░░ 10 of 100 replied, 8 failed, 17.0 s",
    ]
    assert [line for line in told if "replied" in line][-2:] == [
        "█████████░ 90 of 100 replied, 8 failed, 1 min 37 s",
        "█████████░ 92 of 100 replied, 8 failed, 0.0 s",  # the sample's aggregation is at 0
    ]
    (ocr,) = (line for line in told if line.startswith("ocr "))
    # 46 clients with k = 8, 10, ..., 98: the median loss is that of 52 and 54, 1 + 53 / 100.
    assert ocr.startswith("ocr 46 clients loss 1.530 (1.080–1.980) 1.0 (1.0–100.0) s down")
    (slow,) = (line for line in told if line.startswith("slow"))
    assert slow.endswith(
        "vqa-99 1 min 41 s, ocr-98 1 min 40 s, vqa-97 1 min 39 s, ocr-96 1 min 38 s, "
        "vqa-95 1 min 37 s, and 2 more"
    )
    (failures,) = (line for line in told if line.startswith("failed"))
    assert failures.startswith("failed: ocr-0 (x), vqa-1 (x)") and failures.endswith("and 3 more")
    assert len(told) == 2 + 10 + 2 + 2 + 2
    assert told[-1].startswith("exchange 1 of 4 done")


def test_slow_replies_have_a_line_at_least_every_half_minute():
    roster, replies = crowd(1000)
    view = Progress()
    view.lines(roster)
    shown = [e.elapsed for e in replies[:200] if view.lines(e)]
    assert shown == [30, 60, 90, 99, 129, 159, 189, 199]  # 99 and 199 are tenths


def test_scores_of_many_are_over_those_that_have_one():
    roster, replies = crowd(30)
    view, lines = Progress(), []
    scores = [evaluated(client=e.client, task=e.task) for e in replies[:10]]
    for event in (replace(roster, exchange=1), *scores, *replies, CLOSED):
        lines += view.lines(event)
    (ocr,) = (line for line in squeezed(lines) if line.startswith("ocr "))
    assert "ocr 15 clients exact_match 0.610 (0.610–0.610) of 5 before loss" in ocr
    asked = [sent(exchange=2, phase="evaluate", client=e.client, asked=30) for e in replies]
    last = [evaluated(exchange=1, client=e.client, task=e.task) for e in replies]
    lines, pairs = [], zip(asked, last, strict=True)  # instructions leave as replies arrive
    closing = itertools.chain(*pairs, [EvaluationClosed(exchange=1, seconds=1.0)])
    for event in closing:
        lines += view.lines(event)
    told = squeezed(lines)
    assert told[0] == "evaluating the models after exchange 1" and len(told) == 1 + 10 + 2
    assert told[1] == "█░░░░░░░░░ 3 of 30 replied, 0.0 s"
    assert told[-1] == "vqa 15 clients exact_match 0.610 (0.610–0.610) after exchange 1"


def test_twenty_clients_have_a_line_each_and_twenty_one_have_not():
    for count, each in ((MOST_CLIENTS, True), (MOST_CLIENTS + 1, False)):
        roster, replies = crowd(count)
        view = Progress()
        view.lines(roster)
        shown = [line for event in replies for line in view.lines(event)]
        assert any("loss" in line for line in shown) is each
        assert len(shown) == (count if each else 10)


def test_failures_before_the_roster_are_bounded():
    view = Progress()
    absent = [replace(FAILED, phase="roster", client=f"c-{k}") for k in range(300)]
    lines = [line for event in absent for line in view.lines(event)]
    assert len(lines) == 2 + MOST_CLIENTS
    view.lines(crowd(30)[0])
    assert view.lines(CLOSED)[0] == "  and 280 clients more with a failure or a warning"


def test_a_repeated_exchange_of_many_counts_anew():
    roster, replies = crowd(30)
    view = Progress()
    for event in (roster, *(sent(client=e.client) for e in replies), *replies[:15]):
        view.lines(event)
    repeated = view.lines(ExchangeRepeated(exchange=1, reason="15 of 30 came.", undone=1))
    assert repeated[0].startswith("  █████░░░░░  15 of 30 replied")
    for event in (roster, *(sent(client=e.client) for e in replies)):
        view.lines(event)
    lines = [line for event in replies for line in view.lines(event)]
    assert lines[-1].startswith("  ██████████  30 of 30 replied")
