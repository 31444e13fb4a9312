"""The report of many clients: its size and drawing time do not grow with their number."""

import itertools
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from crowds import TASKS, write_run
from panels import cut_texts, drawn

from pilot_flwr.config.loading import load_config
from pilot_flwr.report import matrices, scores, timeline
from pilot_flwr.report.run import FIGURES, write_run_report
from pilot_flwr.run.aggregations import Matrices, read_matrices
from pilot_flwr.run.history import read_run

CLIENTS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("many") / "run", clients=CLIENTS, failing=4)


@pytest.fixture(scope="module")
def run(folder):
    return read_run(folder)


def test_clients_are_clustered_within_their_task(run):
    found = read_matrices(run.folder, run.exchanges[0].aggregated)
    order = matrices.clustered(found, run.task_of)
    assert sorted(order) == list(range(CLIENTS - 4))
    tasks = [run.task_of[found.clients[place]] for place in order]
    assert [task for task, _ in itertools.groupby(tasks)] == list(TASKS)

    def along(places):
        steps = itertools.pairwise(places)
        return sum(found.distances[a, b] for a, b in steps)

    by_name = [p for task in TASKS for p in sorted(order) if run.task_of[found.clients[p]] == task]
    assert along(order) < 0.6 * along(by_name)


def test_a_block_of_close_clients_is_kept_together():
    """Two groups at distance 10 whose members alternate: the order has each in one piece."""
    group = np.arange(12) % 2
    distances = np.where(group[:, None] == group, 1.0, 10.0) * (1 - np.eye(12))
    ordered = group[matrices.cluster(distances)]
    assert len(list(itertools.groupby(ordered))) == 2


@pytest.mark.parametrize(("size", "per_cell"), [(56, 1), (200, 1), (201, 2), (1000, 5)])
def test_a_cell_is_the_mean_or_the_largest_of_its_clients(size, per_cell):
    array = np.random.default_rng(size).random((size, size))
    for pool in (np.mean, np.max):
        cells, found = matrices.pooled(array, pool)
        assert found == per_cell and len(cells) <= 200
        inside = slice(2 * per_cell, 3 * per_cell), slice(0, per_cell)
        assert cells[2, 0] == pytest.approx(pool(array[inside]))


def test_of_too_many_clients_a_sample_of_every_task_is_clustered(monkeypatch):
    monkeypatch.setattr(matrices, "MOST_CLUSTERED", 50)
    task_of = {f"{task}-{k}": task for task in "ab" for k in range(150 if task == "a" else 50)}
    size = len(task_of)
    found = Matrices(list(task_of), np.ones((size, size)), np.eye(size))
    drawn = [list(task_of)[place] for place in matrices.clustered(found, task_of)]
    assert [sum(c.startswith(task) for c in drawn) for task in "ab"] == [37, 12]
    assert len(set(drawn)) == len(drawn)


def test_the_page_says_how_clients_are_ordered_and_lists_tasks(run):
    figure = matrices.distances(run)
    assert "hierarchical clustering" in figure.text and len(figure.panels) == 3
    found = read_matrices(run.folder, run.exchanges[0].aggregated)
    table = figure.tables[0]
    assert table.rows[0] == ["", *TASKS] and "56 clients" in table.title
    vqa = [k for k, client in enumerate(found.clients) if client.startswith("vqa")]
    pairs = [found.distances[a, b] for a in vqa for b in vqa if a != b]
    assert table.rows[1][1] == f"{np.mean(pairs):.3f}"
    shares = matrices.mixing_weights(run).tables[0]
    for row in shares.rows[1:]:
        assert sum(map(float, row[1:])) == pytest.approx(1, abs=0.002)


def test_the_chosen_numbers_of_neighbours_are_listed_by_task(run):
    config = load_config("strategy=pilot_auto data.clients_per_task=20")
    chosen = matrices.mixing_weights(replace(run, config=config)).tables[-1]
    assert chosen.rows[0] == ["", "exchange 1", "exchange 2", "exchange 3"]
    assert chosen.rows[1:] == [[task, "3", "3", "3"] for task in run.tasks]


def test_a_missing_or_damaged_file_is_a_note(run, tmp_path):
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    (folder / "aggregations/0001.safetensors").unlink()
    (folder / "aggregations/0002.safetensors").write_bytes(b"torn")
    figure = matrices.distances(read_run(folder))
    assert len(figure.panels) == 1
    assert "Exchange 1 is not drawn:" in figure.text and "is missing" in figure.text
    assert "Exchange 2 is not drawn:" in figure.text and "cannot be read" in figure.text
    (folder / "aggregations/0003.safetensors").unlink()
    figure = matrices.mixing_weights(read_run(folder))
    assert not figure.panels and figure.text.count("is not drawn") == 3


def test_scores_are_distributions(run):
    figure = scores.learning_curves(run)
    assert "middle half" in figure.text
    (table,) = figure.tables
    row = next(row for row in table.rows if row[:2] == ["vqa", "1"])
    found = [run.scores(c)[1] for c in run.clients("vqa") if 1 in run.scores(c)]
    assert row[2] == f"{len(found)} of {len(run.clients('vqa'))}"
    low, *_, middle, _, high = [float(cell) for cell in row[3:]]
    assert (low, middle, high) == pytest.approx(
        (min(found), np.median(found), max(found)), abs=6e-4
    )


def test_losses_are_listed_by_task(run):
    (table,) = scores.losses(run).tables
    assert len(table.rows) == 1 + 3 * len(TASKS)  # exchanges and tasks, not clients


def test_the_sessions_of_many_are_one_shape_per_exchange(run):
    canvas = drawn(timeline.traffic(run).panels[1])
    assert len(canvas.axes[0].patches) == 3


@pytest.mark.parametrize("figure", FIGURES, ids=[figure.__name__ for figure in FIGURES])
def test_no_name_is_cut_off(run, figure):
    for panel in figure(run).panels:
        assert cut_texts(drawn(panel)) == [], panel.alt


def test_a_panel_of_two_stages_has_room_for_both(tmp_path):
    """Under sampling, clients are in both stages: no chip is lower than its text."""
    run = read_run(write_run(tmp_path / "run", clients=60, share=0.5))
    panels = timeline.time_line(run).panels
    assert [len(exchange.stages) for exchange in run.exchanges] == [1, 2, 2]
    assert len({panel.height for panel in panels}) == 1
    for panel in panels:
        canvas = drawn(panel)
        (axes,) = canvas.axes
        boxes = [patch.get_window_extent() for patch in axes.patches]
        texts = [text for text in axes.texts if "58,368" in text.get_text()]
        assert texts and not cut_texts(canvas)
        for text in texts:
            extent = text.get_window_extent()
            x, y = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
            chip = min((box for box in boxes if box.contains(x, y)), key=lambda box: box.height)
            assert chip.height > extent.height


@pytest.mark.slow
def test_the_report_of_a_thousand_is_no_larger_than_three_times_that_of_nine(tmp_path):
    sizes, seconds = {}, {}
    for clients in (9, 999):
        folder = write_run(tmp_path / f"run-{clients}", clients=clients, rounds=3)
        began = time.process_time()
        write_run_report(folder, folder / "report", router=False)
        seconds[clients] = time.process_time() - began
        sizes[clients] = (folder / "report/index.html").stat().st_size
    assert sizes[999] < 3 * sizes[9] < 4_000_000
    assert seconds[999] < 3 * seconds[9]
    lines = (tmp_path / "run-999/metrics.jsonl").read_bytes().splitlines()
    assert max(len(line) for line in lines if b'"aggregate"' in line) < 20 * 999
