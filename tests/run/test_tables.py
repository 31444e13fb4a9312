from dataclasses import replace

import pytest
from sample_events import AGGREGATED, CLOSED, FAILED, evaluated, sent, trained

from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import (
    AggregationMethod,
    EvaluationClosed,
    RosterCalled,
    RosterEntry,
)
from pilot_flwr.run.tables import (
    aggregation_lines,
    markdown,
    names,
    summary,
    summary_rows,
    timeline,
    timeline_rows,
)

MIXED = {"vqa-0": {"vqa-0": 0.5, "vqa-1": 0.5}, "vqa-1": {"vqa-1": 1.0}}
AVERAGED = {"vqa-0": {"vqa-0": 0.5, "vqa-1": 0.5}, "vqa-1": {"vqa-0": 0.5, "vqa-1": 0.5}}


def recorded(folder):
    run = RunFolder(folder)
    for client, score, examples in (("vqa-0", 1.0, 30), ("vqa-1", 0.5, 10), ("ocr-0", 0.2, 10)):
        run.record(evaluated(client=client, task=client[:3], score=score, examples=examples))
    for client, stage, gradients in (
        ("vqa-0", 1, {"lora": 10, "own_task_adapter": 5, "client_adapter": 5, "base": 0}),
        ("vqa-1", 2, {"lora": 10, "own_task_adapter": 5, "router": 3, "base": 0}),
    ):
        run.record(sent(client=client, stage=stage, down={"lora": 1000, "task_adapters": 500}))
        up = {"lora": 2_000_000, "task_adapters": 0}
        run.record(trained(client=client, stage=stage, gradients=gradients, up=up))
    run.record(replace(FAILED, client="ocr-0", up={"lora": 0, "task_adapters": 700}))
    method = AggregationMethod("adaptive")
    tasks = {"vqa": ("vqa-0", "vqa-1")}
    run.record(replace(AGGREGATED, tasks=tasks, neighbors=MIXED, method=method))
    run.record(replace(CLOSED, exchanges=2, seconds=12.34))
    down = {"lora": 100, "task_adapters": 900}
    run.record(sent(exchange=2, phase="evaluate", client="vqa-0", stage=2, down=down))
    run.record(evaluated(exchange=1, client="vqa-0", score=1.0, examples=30))
    run.record(EvaluationClosed(exchange=1, seconds=3.21))
    return run


def test_summary_weights_clients_by_test_examples_and_tasks_equally(tmp_path):
    rows = {row[0]: row for row in summary_rows(recorded(tmp_path).events)}
    assert rows["vqa"][3] == "0.875"  # (30 · 1 + 10 · 0.5) / 40
    assert rows["vqa"][2] == "40"
    assert rows["ocr"][3] == "0.200"
    assert rows["mean over tasks"][3] == "0.537"  # (0.875 + 0.2) / 2, half to even
    assert rows["task"][4] == "exchange 1 (stage 1 and 2)"


def test_a_score_of_some_of_the_clients_says_of_how_many(tmp_path):
    rows = {row[0]: row for row in summary_rows(recorded(tmp_path).events)}
    assert rows["vqa"][4] == "1.000 (1 of 2)" and rows["vqa"][3] == "0.875"
    assert rows["ocr"][4] == "–"


def test_a_list_of_names_is_bounded():
    assert names(list("abcde")) == "a, b, c, d, e"
    assert names(list("abcdefg")) == "a, b, c, d, e, and 2 more"


def test_summary_does_not_depend_on_who_was_faster(tmp_path):
    events = recorded(tmp_path).events
    rows = summary_rows(events, ("vqa", "ocr"))
    assert rows == summary_rows(events[::-1], ("vqa", "ocr"))
    assert [row[0] for row in rows[1:3]] == ["vqa", "ocr"]
    # Without a score there is no row.
    assert [row[0] for row in summary_rows(events, ("captioning",))[1:3]] == ["ocr", "vqa"]


def test_the_tables_are_markdown(tmp_path):
    events = recorded(tmp_path).events
    lines = summary(events).splitlines()
    assert lines[1].startswith("|---") and lines[-1].split("|")[4].strip() == "**0.537**"
    assert {len(line) for line in lines} == {len(lines[0])}
    assert "| vqa-0<br>x |" in markdown([["a"], ["vqa-0\nx"]])
    assert timeline(events).startswith("# What happened\n") and "<br>stage 2" in timeline(events)


def test_timeline_says_what_the_events_say(tmp_path):
    _, row, closing = timeline_rows(recorded(tmp_path).events)
    assert row == [
        "1 of 2",
        "stage 1: 1 clients\nstage 2: 1 clients\nfailed: 1",
        "Θ_l 10\nψ_t 5\nψ_s 0–5\nφ 0–3",
        "Θ_l 2.0 kB\nψ_t 1.0 kB",
        "Θ_l 4.0 MB\nψ_t 700 B",
        "averages ψ_t of 2 clients\nmixes 2 Θ_l, each with 0–1 others",
        "12.3",
    ]
    down = "Θ_l 100 B\nψ_t 900 B"
    assert closing == ["evaluation", "1 clients", "none", down, "1 scores", "", "3.2"]


@pytest.mark.parametrize(
    ("settings", "tasks", "neighbors", "lines"),
    [
        ({"lora": "adaptive"}, {"vqa": 2}, MIXED, "averages ψ_t of 2 clients; mixes 2 Θ_l"),
        ({"lora": "task"}, {"ocr": 1, "vqa": 2}, AVERAGED | {"ocr-0": {"ocr-0": 1.0}},
         "averages ψ_t per task: ocr of 1, vqa of 2; averages Θ_l per task, of 1, 2 clients"),
        ({"lora": "global"}, {"all": 2}, AVERAGED, "averages Θ_l of 2 clients"),
        ({"lora": "exact"}, {"all": 2}, AVERAGED, "averages Θ_l of 2 clients, the rest in R"),
        ({"lora": "global", "matrices": "B"}, {}, AVERAGED, "averages B of Θ_l of 2 clients"),
        ({"lora": "global", "optimizer": "adam"}, {"all": 2}, AVERAGED,
         "steps by Adam: ψ_t of 2 clients; steps by Adam: Θ_l of 2 clients"),
        ({"lora": "adaptive", "trained_by": "pooled"}, {"vqa": 1}, {"vqa-0": {"vqa-0": 1.0}},
         "takes the pooled client's parameters"),
        ({"lora": "adaptive", "matrices": "none"}, {}, {}, "no aggregation"),
    ],
)  # fmt: skip
def test_each_aggregation_rule_is_told_as_what_it_is(settings, tasks, neighbors, lines):
    method = AggregationMethod(**settings)
    groups = {task: ("c",) * count for task, count in tasks.items()}
    event = replace(AGGREGATED, tasks=groups, neighbors=neighbors)
    told = "; ".join(aggregation_lines(replace(event, method=method)))
    assert lines in told and ("mixes" in told) == (
        lines.startswith("averages") and "mixes" in lines
    )
    assert aggregation_lines(event, method) == aggregation_lines(replace(event, method=method))
    events = [trained(), replace(event, method=method), CLOSED]
    assert timeline_rows(events)[1][5] == told.replace("; ", "\n")


def test_an_aggregation_of_an_earlier_version_claims_no_rule():
    event = replace(AGGREGATED, tasks={"vqa": ("vqa-0", "vqa-1")}, neighbors=AVERAGED)
    assert aggregation_lines(event) == [
        "averages ψ_t of 2 clients",
        "combines 2 Θ_l, each with 1 others",
    ]
    assert aggregation_lines(None) == ["no aggregation"]


def test_result_counts_failures_and_keeps_the_last_scores(tmp_path):
    result = recorded(tmp_path).finish(error=None)
    assert result["status"] == "completed"
    assert result["failures"] == [
        {"round": 1, "phase": "train", "client": "ocr-0", "reason": "boom"}
    ]
    assert result["scores"] == {"vqa-0": 1.0, "vqa-1": 0.5, "ocr-0": 0.2}
    assert recorded(tmp_path).finish(error="E: x")["status"] == "failed"


def test_there_is_no_mean_where_a_task_of_the_run_has_no_score():
    def scored(number, task, score):
        return evaluated(exchange=number, client=task, task=task, score=score, examples=2)

    def means():
        return summary_rows(events)[-1][3:]

    events = [scored(0, "vqa", 0.9), scored(0, "boxes", 0.1), scored(1, "vqa", 0.9)]
    assert means() == ["0.500", "–"]
    events.append(scored(1, "boxes", 0.3))
    assert means() == ["0.500", "0.600"]
    # a task that was never scored
    events.append(RosterCalled(exchange=1, clients=(RosterEntry("c", "captions", 3, 1),)))
    assert means() == ["–", "–"]


def test_no_evaluation_is_said():
    assert summary([]) == "No evaluation.\n"
    private = trained(epsilon=1.0, delta=1e-5, releases=1)
    assert "`privacy.send_metrics`" in summary([private])
    assert "ε <= 1 at δ 1e-05" in timeline([private, CLOSED])


def test_an_approximate_metric_is_called_so():
    events = [evaluated(client="a", task="captions", score=1.5, metric="cider_d", examples=2)]
    assert summary_rows(events)[1][1] == "cider_d"
    events.append(replace(events[0], client="b", score=0.5, approximate=True))
    assert summary_rows(events)[1] == ["captions", "cider_d (approximate)", "4", "1.000"]


def test_a_mean_over_metrics_of_different_ranges_says_so():
    events = [evaluated(client="a", task="captions", metric="cider_d", score=0.5)]
    assert "different ranges" not in summary(events)
    events.append(evaluated(score=0.5))
    assert "different ranges: their mean is not comparable" in summary(events)
    assert "cut off" not in summary(events)
    events.append(evaluated(client="b", cut=3))
    assert (
        "3 answers of the last evaluation were cut off at `evaluation.max_new_tokens`"
        in summary(events)
    )
