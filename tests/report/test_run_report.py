"""The report of a run: figures from what the run recorded, on a page that needs nothing else."""

import base64
import copy
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import client_by_id
from panels import covered, cut_texts, drawn
from PIL import Image

from pilot_flwr.cli import main as cli
from pilot_flwr.data.federation import client_examples
from pilot_flwr.errors import RunError
from pilot_flwr.formatting import human_bytes
from pilot_flwr.inference.runs import client_model, open_run
from pilot_flwr.model.loading import load_processor
from pilot_flwr.report import router
from pilot_flwr.report import scores as losses
from pilot_flwr.report import timeline as traffic
from pilot_flwr.report.page import Figure, Page, Panel, render, some, text_on
from pilot_flwr.report.run import FIGURES
from pilot_flwr.run.aggregations import read_matrices
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import KINDS, Aggregated, Trained, select
from pilot_flwr.run.history import MEAN, gradients, read_run
from pilot_flwr.sweeps import results as rows

CPU = torch.device("cpu")


class Reader(HTMLParser):
    """Collects what a browser would load, and all text."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.images, self.ids, self.links, self.tags = [], [], set(), [], set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.ids.add(values.get("id"))
        if tag == "img":
            self.images.append(values)
        elif tag == "a":
            self.links.append(values["href"])
        self.loaded += [values[key] for key in ("src", "srcset", "data") if key in values]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    assert cli.main(["report", str(finished.folder.path), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def run(finished):
    return read_run(finished.folder.path)


def lines(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_page_needs_nothing_else(report):
    text = (report / "index.html").read_text()
    page = Reader(text)
    assert page.loaded and all(
        source.startswith("data:image/png;base64,") for source in page.loaded
    )
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_picture_is_there_with_words_for_those_who_cannot_see_it(report, run):
    page = Reader((report / "index.html").read_text())
    for image in page.images:
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        assert np.asarray(picture.convert("L")).std() > 4  # not blank
        assert abs(int(image["width"]) * 2 - picture.width) <= 2
        assert len(image["alt"]) > 20
    names = {
        *("learning-curves", "timeline", "losses", "lora-distances", "mixing-weights"),
        *("router", "router-heat-maps", "bytes-and-seconds"),
    }
    assert {path.stem for path in report.glob("*.png")} == names
    assert names <= page.ids
    assert f"seed: {run.config.seed}" in page.text and "commit" in page.text


def test_the_scores_are_those_of_the_summary(report, finished):
    page = Reader((report / "index.html").read_text())
    summary = (finished.folder.path / "summary.md").read_text()
    figures = re.findall(r"\d\.\d{3}", summary)
    assert figures
    shown = re.findall(
        r"\d\.\d{3}", page.text[: page.text.index("Scores of the personalised models")]
    )
    assert all(figure in shown for figure in figures)


def test_what_was_observed_is_what_the_events_say(run):
    events = lines(run)
    for exchange in run.exchanges:
        number = exchange.number
        orders = [
            e
            for e in events
            if e["event"] == "order" and e["round"] == number and e["phase"] == "train"
        ]
        trained = [e for e in events if e["event"] == "train" and e["round"] == number]
        assert sum(exchange.down.values()) == sum(sum(e["down"].values()) for e in orders)
        assert sum(exchange.up.values()) == sum(e["bytes_up"] for e in trained)
        assert {e.client for e in exchange.trained} == {e["client"] for e in trained}
        (aggregated,) = [e for e in events if e["event"] == "aggregate" and e["round"] == number]
        assert "neighbors" not in aggregated and "distances" not in aggregated
        found = read_matrices(run.folder, exchange.aggregated)
        assert found.clients == sorted(e["client"] for e in trained)
        np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    assert [e.number for e in run.exchanges] == [1, 2]
    assert list(run.exchanges[0].stages) == [1] and list(run.exchanges[1].stages) == [2]
    first, second = (gradients(exchange.trained) for exchange in run.exchanges)
    assert "router" in second and "router" not in first


def test_all_orders_of_the_run_are_counted_as_results_csv_counts_them(run):
    row = rows._effort(run.events, run.folder)
    down, up = (sum(sum(getattr(e, w).values()) for e in run.all_exchanges) for w in ("down", "up"))
    assert (down, up) == (row["bytes_down"], row["bytes_up"])
    closing = [e for e in lines(run) if e["event"] == "order" and e["round"] == 3]
    assert {e["phase"] for e in closing} == {"evaluate"} and len(closing) == 4
    assert run.closing.down == {
        part: sum(e["down"][part] for e in closing) for part in ("lora", "task_adapters")
    }
    figure = traffic.traffic(run)
    assert f"{human_bytes(down)} down and {human_bytes(up)} up" in figure.text
    (table,) = figure.tables
    assert [row[0] for row in table.rows[1:]] == ["1", "2", "closing evaluation"]
    numbers = [[int(c.replace(",", "")) for c in row[2:]] for row in table.rows[1:]]
    assert sum(map(sum, numbers)) == down + up
    (axes,) = drawn(figure.panels[0]).axes
    heights = [bar.get_height() for bars in axes.containers for bar in bars]
    assert sum(heights) == down + up
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "closing"]


def test_an_exchange_that_is_not_closed_is_counted_too(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    kept = [e for e in lines(run) if e["round"] == 1 or e["event"] == "order" and e["round"] == 2]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
    running = read_run(tmp_path / "run")
    assert running.closing is None and [e.seconds is None for e in running.exchanges] == [
        False,
        True,
    ]
    row = rows._effort(running.events, running.folder)
    assert row["bytes_down"] == sum(sum(e.down.values()) for e in running.all_exchanges)
    for figure in FIGURES:
        for panel in figure(running).panels:
            drawn(panel)


def test_the_bars_of_a_hundred_clients_can_be_seen(run):
    session = select(run.events, Trained, 1)[0]
    more = [replace(session, client=f"vqa-{number}") for number in range(100)]
    others = [event for event in run.events if not isinstance(event, Trained)]
    shares = []
    for sessions in (more[:4], more):  # of one length: bars of one height
        figure = traffic.traffic(replace(run, events=[*others, *sessions]))
        picture = np.asarray(Image.open(io.BytesIO(figure.panels[1].png)).convert("RGB"))
        blue = np.abs(picture.astype(int) - (0x56, 0xB4, 0xE9)).max(axis=2) < 40
        shares.append(blue.mean())
    assert shares[1] > shares[0] / 2


def test_scores_are_means_over_examples_and_then_over_tasks(run):
    events = [e for e in lines(run) if e["event"] == "evaluate"]
    numbers = {e["round"] for e in events}
    assert set(run.curves[MEAN]) == numbers == {0, 1, 2}
    for number in numbers:
        tasks = {}
        for task in run.tasks:
            mine = [e for e in events if e["round"] == number and e["task"] == task]
            right = sum(e["score"] * e["examples"] for e in mine)
            tasks[task] = right / sum(e["examples"] for e in mine)
            assert run.curves[task][number] == pytest.approx(tasks[task], rel=1e-12)
        assert run.curves[MEAN][number] == pytest.approx(np.mean(list(tasks.values())), rel=1e-12)


def test_the_stacked_parts_add_up_to_the_loss_that_was_trained(run):
    trained = select(run.events, Trained)
    weights = losses.loss_weights(run.config.train)
    for event in trained:
        parts = losses.contributions(event, weights)
        assert losses.REST not in parts
        assert sum(parts.values()) == pytest.approx(event.loss, rel=1e-4)
    other = replace(trained[0], losses=trained[0].losses | {"total": trained[0].loss + 0.5})
    assert losses.contributions(other, weights)[losses.REST] == pytest.approx(0.5, rel=1e-3)


def test_the_proximal_term_has_a_name_and_its_coefficient_already(run):
    train = replace(run.config.train, proximal_weight=0.25)
    pulled = [
        replace(e, losses={**e.losses, "total": e.loss + 0.5, "proximal": 0.5})
        if isinstance(e, Trained)
        else e
        for e in run.events
    ]
    fedprox = replace(run, events=pulled, config=replace(run.config, train=train))
    event = select(pulled, Trained)[0]
    parts = losses.contributions(event, losses.loss_weights(train))
    assert parts["proximal"] == 0.5 and losses.REST not in parts
    figure = losses.losses(fedprox)
    assert "FedProx's proximal term" in figure.text and "μ is 0.25" in figure.text
    assert "FedProx" not in losses.losses(run).text
    canvases = [drawn(panel) for panel in figure.panels]
    legend = [text.get_text() for text in canvases[0].legends[0].get_texts()]
    assert any("Theta_{sent}" in text for text in legend) and losses.REST not in legend
    assert all(not cut_texts(canvas) for canvas in canvases)


def test_router_probabilities_are_the_softmax_of_each_token(finished):
    opened = open_run(finished.folder.path)
    model = client_model(opened, "vqa-1", device=CPU)
    processor = load_processor(opened.config.model.path)
    client = client_by_id(opened.config.data, "vqa-1")
    examples = client_examples(opened.config.data, client, "test", seed=opened.config.seed)[:5]
    mean, images, maps = router.route(model, processor, examples, shown=2)
    assert len(images) == len(maps) == 2
    weight = finished.private("vqa-1").groups["router"]["weight"].double()
    total = np.zeros(2)
    for index, example in enumerate(examples):
        image = example.images[0].read()
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        (features,) = model.encode_images({"pixel_values": pixels})[0].double()
        for token, vector in enumerate(features):
            scores = [float(np.exp(float(vector @ row))) for row in weight]
            expected = np.array(scores) / sum(scores)
            total += expected
            if index < 2:
                side = maps[index].shape[0]
                np.testing.assert_allclose(
                    maps[index][token // side, token % side], expected, atol=1e-5
                )
        if index < 2:
            np.testing.assert_allclose(images[index], np.asarray(image) / 255, atol=1e-6)
    np.testing.assert_allclose(mean, total / (5 * len(features)), atol=1e-5)


def test_the_report_says_why_it_has_no_router(finished, tmp_path):
    folder = Path(shutil.copytree(finished.folder.path, tmp_path / "run"))
    shutil.rmtree(folder / "clients")
    (figure,) = router.router_figures(read_run(folder), lambda line: None)
    assert not figure.panels and "private states are not here" in figure.text


def test_routers_are_shown_of_clients_that_have_one(finished, monkeypatch):
    """Under sampling most clients have not reached stage 2 when the run ends."""
    run = read_run(finished.folder.path)
    for exchange in run.exchanges:
        kept = [e for e in exchange.trained if e.client != "vqa-0" or e.stage == 1]
        exchange.trained[:] = kept
    offered = []
    monkeypatch.setattr(router, "some", lambda clients, most: offered.extend(clients) or [])
    router.router_figures(run, lambda line: None)
    assert {client.id for client in offered} == set(run.task_of) - {"vqa-0"}


@pytest.mark.parametrize("figure", FIGURES, ids=[figure.__name__ for figure in FIGURES])
def test_no_name_is_cut_off_nor_takes_the_plots_room(run, figure):
    for panel in figure(run).panels:
        assert cut_texts(drawn(panel)) == [], panel.alt
    long = figure(with_long_names(run))
    assert long.panels
    for panel in long.panels:
        canvas = drawn(panel)
        assert cut_texts(canvas) == [], panel.alt
        assert covered(canvas) == []
        plot = canvas.axes[0].get_window_extent()
        assert min(plot.width, plot.height) > 1.1 * canvas.dpi, panel.alt


def as_of_earlier_versions(run, event):
    """The event's JSON object, with the names of the clients in an aggregation's matrices."""
    values = event.to_dict()
    if isinstance(event, Aggregated):
        found = read_matrices(run.folder, event)
        for key, matrix in (("neighbors", found.weights), ("distances", found.distances)):
            rows = zip(found.clients, matrix.tolist(), strict=True)
            values[key] = {c: dict(zip(found.clients, row, strict=True)) for c, row in rows}
        del values["file"], values["mixing"]
    return values


def with_long_names(run):
    """The same run of clients and tasks with names as long as names of people's sites are."""
    tasks = {
        "vqa": "visual-question-answering-of-scanned-documents",
        "counting": "counting-of-objects-in-photographs-of-shelves",
    }
    text = json.dumps([as_of_earlier_versions(run, event) for event in run.events])
    for short, long in tasks.items():
        text = re.sub(rf'"{short}-(\d+)"', rf'"university-hospital-of-{long}-department-\1"', text)
        text = text.replace(f'"{short}"', f'"{long}"')
    events = [KINDS[values["event"]].from_dict(values) for values in json.loads(text)]
    config = copy.copy(run.config)
    data = copy.copy(run.config.data)
    object.__setattr__(data, "tasks", tuple(tasks[task] for task in run.config.data.tasks))
    object.__setattr__(config, "data", data)
    return replace(run, events=events, config=config)


def test_a_text_that_is_cut_off_is_found():
    def draw(axes):
        axes.set_axis_off()
        axes.text(0.1, 0.5, words).set_in_layout(False)

    words = "much too long for any panel as wide as a phone, whatever a layout makes of it"
    assert cut_texts(drawn(Panel(draw, ""))) == [words]


def test_text_from_a_run_is_no_markup():
    evil = "<script>alert(1)</script>"
    figure = Figure("f", evil, evil)
    page = Page(evil, [("folder", evil)], [evil], [figure], files=[(evil, evil)])
    text = render(page)
    assert "<script>" not in text and text.count("&lt;script&gt;") == 9


def test_a_run_without_scores_or_exchanges_is_no_error(run, tmp_path):
    (tmp_path / "config.yaml").write_text(run.config_text)
    empty = read_run(tmp_path)
    assert all(not figure(empty).panels for figure in FIGURES)
    with pytest.raises(RunError, match="no readable config"):
        read_run(tmp_path / "nowhere")
    assert read_events(tmp_path) == []


def test_of_many_exchanges_some_are_drawn():
    assert some([1, 2, 3], 9) == [1, 2, 3]
    chosen = some(list(range(1, 101)), 6)
    assert len(chosen) == 6 and chosen[0] == 1 and chosen[-1] == 100


@pytest.mark.parametrize("background", ["#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#FFFFFF"])
def test_text_on_a_colour_has_the_contrast_that_wcag_asks_of_text(background):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted([luminance(background), luminance(text_on(background))])
    assert (light + 0.05) / (dark + 0.05) >= 4.5
