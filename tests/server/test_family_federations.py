"""A whole federation of two clients for every family: both stages, scores, report, resume."""

import json
import math

import pytest
import torch
from families import WRITERS
from flwr.app import MessageType
from inprocess import assert_same_state, finish, resumed

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.cli import main as cli
from pilot_flwr.model.architectures import known_config
from pilot_flwr.report.router import router_figures
from pilot_flwr.run.history import read_run

pytestmark = pytest.mark.family("federation")
CLIENTS = ("counting-0", "vqa-0")


@pytest.fixture(scope="module", params=list(WRITERS))
def overrides(request, tmp_path_factory):
    path = WRITERS[request.param](tmp_path_factory.mktemp("base"))
    return (
        "data.tasks=[vqa,counting] data.clients_per_task=1 data.train_examples=4 "
        "data.test_examples=2 train.epochs=1 train.batch_size=2 evaluation.max_new_tokens=2 "
        f"strategy.rounds=1 model.lora.rank=2 model.path={path}"
    )


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory):
    return finish(tmp_path_factory.mktemp("run") / "run", overrides)


def test_both_stages_train_their_groups_at_both_clients(finished):
    assert finished.events("failure") == []
    for exchange, stage in ((1, 1), (2, 2)):
        events = finished.events("train", round=exchange)
        assert {event["client"] for event in events} == set(CLIENTS)
        trained = {group for group, row in GROUPS.items() if stage in row.stages}
        for event in events:
            assert event["stage"] == stage and math.isfinite(event["loss"])
            assert {g for g, count in event["gradients"].items() if count} == trained


def test_every_exchange_is_scored(finished):
    for exchange in (0, 1, 2):
        events = finished.events("evaluate", round=exchange)
        assert {event["client"] for event in events} == set(CLIENTS)
        assert all(event["examples"] == 2 and 0 <= event["score"] <= 1 for event in events)


def test_the_report_shows_what_the_router_does(finished):
    """The part of the report that computes with the model; one picture of each kind is drawn."""
    means, *maps = router_figures(read_run(finished.folder.path), print)
    (table,) = means.tables
    assert {client for client, *_ in table.rows[1:]} == set(CLIENTS)
    assert all(
        sum(map(float, shares)) == pytest.approx(1, abs=2e-3) for _, *shares in table.rows[1:]
    )
    packed = known_config(finished.config.model).model_type.startswith(
        "qwen"
    )  # their patches are in no order that could be drawn
    assert len(maps) == (not packed)
    assert all(figure.panels[0].png for figure in (means, *maps))


@pytest.mark.slow
def test_the_whole_report_is_written(finished, tmp_path):
    assert cli.main(["report", str(finished.folder.path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert all(client in page for client in CLIENTS) and page.count("<img") > 3


def test_the_runs_models_are_evaluated_again_from_its_folder(finished, tmp_path):
    out = tmp_path / "scores.json"
    assert cli.main(["evaluate", str(finished.folder.path), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["clients"]
    assert {row["client"] for row in rows} == set(CLIENTS)
    assert all(row["score"] == row["recorded"] and row["examples"] == 2 for row in rows)


def test_a_resumed_run_is_the_uninterrupted_one(overrides, finished, tmp_path):
    again = resumed(tmp_path / "run", overrides, exchange=2)
    assert_same_state(again.strategy.state, finished.strategy.state)
    for client in CLIENTS:
        mine, theirs = (run.private(client).groups for run in (again, finished))
        assert mine.keys() == theirs.keys() and mine["router"]
        for group, tensors in theirs.items():
            assert all(torch.equal(tensor, mine[group][n]) for n, tensor in tensors.items())


def test_the_private_tensors_stay_at_their_client(finished):
    names = {
        f"{record}/{name}"
        for reply in finished.replies(MessageType.TRAIN)
        for record, arrays in reply.content.array_records.items()
        for name in arrays
    }
    assert names and not any("client_adapter" in n or "router" in n for n in names)
