"""Live logs: what TensorBoard and Weights & Biases are given is what the run recorded."""

import logging
from dataclasses import replace

import pytest
from sample_events import FAILED, evaluated, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pilot_flwr.config.loading import load_config
from pilot_flwr.errors import ConfigError
from pilot_flwr.run import loggers as live
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import ExchangeClosed, ExchangeRepeated, RosterCalled, RosterEntry
from pilot_flwr.run.loggers import TENSORBOARD, Numbers, live_logs


def config(**changes):
    loaded = load_config("")
    return replace(loaded, run=replace(loaded.run, **changes))


def read(folder):
    """All numbers in TensorBoard's files: name → exchange → value."""
    accumulator = EventAccumulator(str(folder / TENSORBOARD))
    accumulator.Reload()
    return {
        tag: {entry.step: entry.value for entry in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }


def replay(folder, events, **changes):
    with live_logs(config(**changes), RunFolder(folder), name="run-1", after=None) as log:
        for event in events:
            log(event)


@pytest.fixture(scope="module")
def logged(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    replay(folder, finished.folder.events)
    return read(folder)


def test_tensorboard_has_every_score_and_loss(finished, logged):
    for event in finished.events("evaluate"):
        value = logged[f"score/{event['client']}"][event["round"]]
        assert value == pytest.approx(event["score"], rel=1e-6)
    for event in finished.events("train"):
        for key in ("loss", "loss_ce", "loss_balance", "seconds"):
            value = logged[f"{key}/{event['client']}"][event["round"]]
            assert value == pytest.approx(event[key], rel=1e-6)


def test_tensorboard_has_the_exchanges_sums_and_the_tasks_means(finished, logged):
    for closed in finished.events("round"):
        number = closed["round"]
        sent = finished.events("order", round=number, phase="train")
        assert logged["exchange/bytes_down"][number] == sum(sum(e["down"].values()) for e in sent)
        up = sum(e["bytes_up"] for e in finished.events("train", round=number))
        assert logged["exchange/bytes_up"][number] == up
        assert logged["exchange/failures"][number] == 0
    for number in (0, 1, 2):
        means = []
        for task in ("vqa", "counting"):
            mine = finished.events("evaluate", round=number, task=task)
            right = sum(e["score"] * e["examples"] for e in mine)
            means.append(right / sum(e["examples"] for e in mine))
            assert logged[f"task_score/{task}"][number] == pytest.approx(means[-1], rel=1e-6)
        assert logged["task_score/mean"][number] == pytest.approx(sum(means) / 2, rel=1e-6)


def test_exchanges_and_closing_evaluation_add_up_to_all_instructions(finished, logged):
    (closing,) = finished.events("closing_evaluation")
    orders = [sum(e["down"].values()) for e in finished.events("order")]
    last = [sum(e["down"].values()) for e in finished.events("order", round=closing["round"] + 1)]
    assert logged["closing_evaluation/bytes_down"] == {closing["round"] + 1: sum(last)}
    assert sum(logged["exchange/bytes_down"].values()) + sum(last) == sum(orders)
    assert logged["closing_evaluation/seconds"] == pytest.approx({3: closing["seconds"]})


def round_event(number, seconds):
    return ExchangeClosed(exchange=number, exchanges=3, seconds=seconds)


def test_a_resumed_run_takes_back_what_is_done_again(tmp_path):
    replay(tmp_path, [round_event(1, 1.0), round_event(2, 2.0)])
    with live_logs(config(), RunFolder(tmp_path), name="run-1", after=1) as log:
        log(round_event(2, 7.0))
    assert read(tmp_path)["exchange/seconds"] == {1: 1.0, 2: 7.0}


def test_a_repeated_exchange_is_taken_back(tmp_path):
    failure = replace(FAILED, client="a")
    repeat = ExchangeRepeated(exchange=1, undone=1)
    loss = trained(client="b", losses={"total": 5.0})
    replay(tmp_path, [failure, loss, repeat, round_event(1, 3.0)])
    found = read(tmp_path)
    assert found["exchange/failures"] == {1: 0.0}
    assert not found["loss/b"]


def test_there_is_no_mean_where_a_task_of_the_run_has_no_score(tmp_path):
    def scored(number, task, score):
        return evaluated(exchange=number, client=task, task=task, score=score, examples=10)

    members = tuple(RosterEntry(task, task, 10, 1) for task in ("vqa", "boxes"))
    roster = RosterCalled(exchange=1, clients=members)
    missing = [scored(0, "vqa", 0.9), round_event(1, 1.0)]
    whole = [scored(1, "vqa", 0.9), scored(1, "boxes", 0.1), round_event(2, 1.0)]
    resumed = RunFolder(tmp_path, [roster])
    with live_logs(config(), resumed, name="run-1", after=None) as log:
        for event in (*missing, *whole):
            log(event)
    found = read(tmp_path)
    assert found["task_score/vqa"] == pytest.approx({0: 0.9, 1: 0.9})
    assert found["task_score/mean"] == pytest.approx({1: 0.5})


def test_a_withheld_loss_is_no_number():
    withheld = {"total": None, "ce": None}
    event = trained(client="b", losses=withheld, seconds=1.5, epsilon=2.0, delta=1e-5, releases=1)
    assert Numbers().of(event) == (1, {"seconds/b": 1.5, "epsilon/b": 2.0})


def test_scores_of_a_repeated_exchange_count_once():
    numbers = Numbers()
    for score in (0.0, 1.0):
        numbers.of(evaluated(exchange=0, score=score))
    assert numbers.of_tasks(round_event(1, 1.0)) == (
        0,
        {"task_score/vqa": 1.0, "task_score/mean": 1.0},
    )


def test_a_log_that_fails_never_stops_a_run(tmp_path, monkeypatch, caplog):
    class Full:
        def __init__(self, *arguments):
            self.asked = 0

        def log(self, step, values):
            raise OSError("No space left on device")

        def close(self):
            raise AssertionError("it gets no more")

    monkeypatch.setattr(live, "TensorBoard", Full)
    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.WARNING, logger="flwr"):
        replay(tmp_path, [round_event(1, 1.0), round_event(2, 2.0)])
    assert [r.getMessage() for r in caplog.records] == [
        "Full failed and is disabled: OSError: No space left on device"
    ]


def test_off_is_off(tmp_path):
    replay(tmp_path, [round_event(1, 1.0)], tensorboard=False)
    assert not (tmp_path / TENSORBOARD).exists()


def test_weights_and_biases_has_to_be_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"`run.wandb` is 'offline'.*pilot-flwr\[wandb\]"):
        replay(tmp_path, [], wandb="offline", tensorboard=False)


@pytest.mark.slow
def test_weights_and_biases_gets_the_same_numbers(finished, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = []
    real = wandb.sdk.wandb_run.Run.log

    def log(self, data, *arguments, **options):
        logged.append(dict(data))
        return real(self, data, *arguments, **options)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", log)
    replay(tmp_path, finished.folder.events, wandb="offline", tensorboard=False)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    for event in finished.events("evaluate"):
        key = f"score/{event['client']}"
        assert any(r["exchange"] == event["round"] and r.get(key) == event["score"] for r in logged)
