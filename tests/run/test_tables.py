from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.tables import summary, timeline


def events(folder):
    run = RunFolder(folder)
    for client, score, examples in (("vqa-0", 1.0, 30), ("vqa-1", 0.5, 10), ("ocr-0", 0.2, 10)):
        run.record("evaluate", round=0, client=client, task=client[:3], score=score,
                   metric="exact_match", examples=examples, seconds=1.0)  # fmt: skip
    for client, stage, grads in (
        ("vqa-0", 1, {"lora": 10, "own_task_adapter": 5, "client_adapter": 5, "base": 0}),
        ("vqa-1", 2, {"lora": 10, "own_task_adapter": 5, "router": 3, "base": 0}),
    ):
        run.record("order", round=1, phase="train", client=client, task="vqa", stage=stage,
                   down={"lora": 1000, "task_adapters": 500})  # fmt: skip
        run.record("train", round=1, stage=stage, client=client, task="vqa", loss=1.0,
                   gradients=grads, examples=5, steps=2, seconds=1.0, bytes_down=1500, bytes_up=0,
                   up={"lora": 2_000_000, "task_adapters": 0})  # fmt: skip
    run.record("failure", round=1, phase="train", client="ocr-0", reason="boom",
               up={"lora": 0, "task_adapters": 700})  # fmt: skip
    run.record("aggregate", round=1, seconds=0.1, clients=2, tasks={"vqa": ["vqa-0", "vqa-1"]},
               neighbors={"vqa-0": {"vqa-0": 0.5, "vqa-1": 0.5}, "vqa-1": {"vqa-1": 1.0}},
               distances={})  # fmt: skip
    run.record("round", round=1, exchanges=2, seconds=12.34)
    run.record("order", round=2, phase="evaluate", client="vqa-0", task="vqa", stage=2,
               down={"lora": 100, "task_adapters": 900})  # fmt: skip
    run.record("evaluate", round=1, client="vqa-0", task="vqa", score=1.0, metric="exact_match",
               examples=30, seconds=1.0)  # fmt: skip
    run.record("closing_evaluation", round=1, seconds=3.21)
    return run


def test_summary_weights_clients_by_test_examples_and_tasks_equally(tmp_path):
    table = summary(events(tmp_path).events)
    rows = {
        cells[1].strip("* "): cells for cells in map(lambda r: r.split("|"), table.splitlines())
    }
    assert rows["vqa"][4].strip() == "0.875"  # (30 · 1 + 10 · 0.5) / 40
    assert rows["vqa"][3].strip() == "40"
    assert rows["ocr"][4].strip() == "0.200"
    assert rows["mean over tasks"][4].strip() == "**0.537**"  # (0.875 + 0.2) / 2, half to even
    assert rows["task"][5].strip() == "exchange 1 (stage 1 and 2)"


def test_summary_does_not_depend_on_who_was_faster(tmp_path):
    recorded = events(tmp_path).events
    tables = {summary(recorded, ("vqa", "ocr")), summary(recorded[::-1], ("vqa", "ocr"))}
    (table,) = tables
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:4]] == ["vqa", "ocr"]
    rows = summary(recorded, ("captioning",)).splitlines()  # without a score there is no row
    assert [row.split("|")[1].strip() for row in rows[2:4]] == ["ocr", "vqa"]


def test_timeline_says_what_the_events_say(tmp_path):
    row, closing = timeline(events(tmp_path).events).splitlines()[-2:]
    for part in (
        "1 of 2",
        "stage 1: 1 clients<br>stage 2: 1 clients<br>failed: 1",
        "Θ_l 10<br>ψ_t 5<br>ψ_s 0–5<br>φ 0–3",
        "Θ_l 2.0 kB<br>ψ_t 1.0 kB",
        "Θ_l 4.0 MB<br>ψ_t 700 B",
        "averaged ψ_t: vqa of 2<br>mixed 2 Θ_l, each with 0–1 others",
        "12.3",
    ):
        assert part in row
    assert "base" not in row
    cells = [cell.strip() for cell in closing.split("|")][1:-1]
    assert cells == ["evaluation", "1 clients", "none", "Θ_l 100 B<br>ψ_t 900 B", "1 scores", "",
                     "3.2"]  # fmt: skip


def test_result_counts_failures_and_keeps_the_last_scores(tmp_path):
    result = events(tmp_path).finish(error=None)
    assert result["status"] == "completed"
    assert result["failures"] == [
        {"round": 1, "phase": "train", "client": "ocr-0", "reason": "boom"}
    ]
    assert result["scores"] == {"vqa-0": 1.0, "vqa-1": 0.5, "ocr-0": 0.2}
    assert events(tmp_path).finish(error="E: x")["status"] == "failed"


def test_there_is_no_mean_where_a_task_of_the_run_has_no_score(tmp_path):
    run = RunFolder(tmp_path)
    scored = {"metric": "exact_match", "examples": 2, "seconds": 1.0}
    for number, task, score in ((0, "vqa", 0.9), (0, "boxes", 0.1), (1, "vqa", 0.9)):
        run.record("evaluate", round=number, client=task, task=task, score=score, **scored)

    def means():
        last = summary(run.events).rstrip().splitlines()[-1]
        return [cell.strip("* ") for cell in last.split("|")[4:-1]]

    assert means() == ["0.500", "–"]
    run.record("evaluate", round=1, client="boxes", task="boxes", score=0.3, **scored)
    assert means() == ["0.500", "0.600"]
    members = [{"client": "c", "task": "captions", "examples": 3, "stage": 1}]
    run.record("roster", round=1, clients=members)  # a task that was never scored
    assert means() == ["–", "–"]


def test_no_evaluation_is_said(tmp_path):
    assert summary([]) == "No evaluation.\n"


def test_an_approximate_metric_is_called_so(tmp_path):
    run = RunFolder(tmp_path)
    scored = {"task": "captions", "metric": "cider_d", "examples": 2, "seconds": 1.0, "round": 0}
    run.record("evaluate", client="a", score=1.5, approximate=False, **scored)
    assert "(approximate)" not in summary(run.events)
    run.record("evaluate", client="b", score=0.5, approximate=True, **scored)
    assert "| cider_d (approximate) | 4             | 1.000" in summary(run.events)


def test_a_mean_over_metrics_of_different_ranges_says_so(tmp_path):
    run = RunFolder(tmp_path)
    for task, metric in (("captions", "cider_d"), ("vqa", "exact_match")):
        note = "different ranges" in summary(run.events)
        assert not note
        run.record("evaluate", round=0, client=task, task=task, score=0.5, metric=metric,
                   examples=2, seconds=1.0)  # fmt: skip
    assert "cut off" not in summary(run.events)
    run.record("evaluate", round=0, client="a", task="vqa", score=0.5, metric="exact_match",
               examples=9, seconds=1.0, cut=3)  # fmt: skip
    assert "Of the last answers 3 were cut off at `evaluation.max_new_tokens`" in summary(
        run.events
    )
    assert "different ranges: their mean is no figure to compare" in summary(run.events)
