"""The report of a sweep: every seed's score, and the methods' learning curves."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from panels import covered, cut_texts, drawn

from pilot_flwr.cli import main as cli
from pilot_flwr.cli.run import write_report
from pilot_flwr.report import sweep as sweep_curves
from pilot_flwr.report.sweep import dots, method_curves, short_labels, shortened
from pilot_flwr.run.events import Evaluated, select
from pilot_flwr.run.history import MEAN
from pilot_flwr.sweeps.compare import UNTOUCHED, MethodScores, compare
from pilot_flwr.sweeps.results import as_csv, label_of, read_rows

ROOT = Path(__file__).resolve().parents[2]
SCORES = {"pilot": {0: (0.9, 0.3), 1: (0.8, 0.5)}, "fedit": {0: (0.7, 0.1), 1: (0.6, 0.2)}}


@pytest.fixture
def sweep(tmp_path):
    """A sweep's results as the sweep writes them, with one job that failed."""
    rows = []
    for method, seeds in SCORES.items():
        for seed, (vqa, counting) in seeds.items():
            rows.append(
                {
                    **{"name": "small", "method": method, "variant": "", "seed": seed},
                    **{"status": "done", "mean": (vqa + counting) / 2, "zero_shot_mean": 0.25},
                    **{"score.vqa": vqa, "score.counting": counting},
                    **{"zero_shot.vqa": 0.5, "zero_shot.counting": 0.0},
                    **{"evaluated_on": "test", "engine": "in-process", "seconds": 3.5},
                    **{"metrics": "vqa:exact_match counting:exact_match", "settings": method},
                    **{"bytes_up": 10, "bytes_down": 20, "commit": "c0ffee", "changed": "false"},
                    **{"versions": "torch=2", "job": f"{method}-{seed}", "overrides": ""},
                    "error": "",
                }
            )
    rows.append({"status": "failed", "method": "local", "job": "local-0", "error": "Disk full."})
    (tmp_path / "results.csv").write_text(as_csv(rows))
    return tmp_path


def test_the_dots_are_the_seeds(sweep):
    (comparison,) = compare(read_rows(sweep))
    panels = dots(comparison).panels
    for what, panel in zip(["mean over tasks", "vqa"], panels, strict=False):
        (axes,) = drawn(panel).axes
        drawn_dots = [sorted(line.get_xdata()) for line in axes.get_lines() if line.get_alpha()]
        expected = [[0.25, 0.25] if what == MEAN else [0.5, 0.5]]
        for seeds in SCORES.values():
            expected.append(sorted(sum(s) / 2 if what == MEAN else s[0] for s in seeds.values()))
        np.testing.assert_allclose(drawn_dots, expected)
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == [UNTOUCHED, *SCORES]


def test_curves_are_means_over_seeds_of_what_the_runs_recorded(finished, tmp_path):
    raised = {"a": 0.0, "b": 0.25}
    for job, more in raised.items():
        shutil.copytree(finished.folder.path, tmp_path / job)
        events = [
            replace(e, score=e.score + more) if isinstance(e, Evaluated) else e
            for e in finished.folder.events
        ]
        lines = "".join(json.dumps(event.to_dict()) + "\n" for event in events)
        (tmp_path / job / "metrics.jsonl").write_text(lines)
    pilot = MethodScores("pilot", {}, jobs=(*raised, "gone"))
    curves = method_curves([pilot], tmp_path)["pilot"]
    for number in (0, 1, 2):
        mine = [e for e in select(finished.folder.events, Evaluated, number) if e.task == "vqa"]
        right = sum(e.score * e.examples for e in mine) / sum(e.examples for e in mine)
        assert curves["vqa"][number] == pytest.approx(right + 0.125)
    assert set(curves) == {"vqa", "counting", MEAN}


METHODS = sorted(path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml"))
RATES = [("fedadam", f"strategy.server_optimizer.learning_rate={rate}") for rate in (0.001, 0.1)]
VARIANTS = {
    "methods": [(method, "") for method in METHODS],
    "rates": [(m, f"train.lr_scale={s}") for m in METHODS[:11] for s in (0.25, 0.5, 1, 2, 4)]
    + RATES,
    "one line": [("pilot_no_cross_task_adapters", "train.lr_scale=0.25 train.weight_decay=0.01")],
    "long": [(m, f"train.stage1.lora_lr={k} data.image_cache_megabytes=1000000 a=" + 80 * "x")
             for m in METHODS[:3] for k in (1, 2)],
}  # fmt: skip


def of_variants(name):
    rows = [
        {
            **{"name": "s", "method": method, "variant": variant, "seed": str(seed)},
            **{"status": "done", "mean": str(0.01 * place + 0.1 * seed), "zero_shot_mean": "0.2"},
            **{"score.vqa": "0.5", "zero_shot.vqa": "0.2", "settings": f"{method} {variant}"},
            **{"score.grounding-of-very-long-referring-expressions": "0.3"},
            **{"zero_shot.grounding-of-very-long-referring-expressions": "0"},
            **{"metrics": "vqa:exact_match grounding-of-very-long-referring-expressions:iou"},
            **{"evaluated_on": "test", "job": f"{method} {variant}"},
        }
        for place, (method, variant) in enumerate(VARIANTS[name])
        for seed in (0, 1)
    ]
    return compare(rows)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_line_of_a_large_sweep_can_be_read(name, monkeypatch):
    comparison = of_variants(name)
    found = {
        label_of(m, v): {MEAN: {0: 0.2, 1: 0.01 * place}, "vqa": {0: 0.1, 1: 0.2}}
        for place, (m, v) in enumerate(VARIANTS[name])
    }
    monkeypatch.setattr(sweep_curves, "method_curves", lambda methods, runs: found)
    for figure in (dots(comparison), sweep_curves.curves(comparison, Path())):
        mean, _, long_task = figure.panels
        for panel in (mean, long_task):
            canvas = drawn(panel)
            assert cut_texts(canvas) == [], (figure.name, panel.alt)
            assert covered(canvas) == []
            (axes,) = canvas.axes
            plot = axes.get_window_extent()
            assert min(plot.width, 2 * plot.height) > 2 * canvas.dpi, figure.name
            names = [label.get_window_extent() for label in axes.get_yticklabels()]
            if figure.name == "seeds":
                assert len(names) == len(comparison.methods)
                assert not any(a.padded(-1).overlaps(b) for a, b in pairwise(names))


def test_the_curves_drawn_are_the_best_and_the_baseline(monkeypatch):
    comparison = of_variants("methods")
    found = {method: {MEAN: {0: 0.9, 3: 0.01 * n}} for n, method in enumerate(METHODS)}
    monkeypatch.setattr(sweep_curves, "method_curves", lambda methods, runs: found)
    assert sweep_curves.best(found, None) == METHODS[::-1][:12]
    assert sweep_curves.best(found, METHODS[0]) == [*METHODS[::-1][:11], METHODS[0]]
    assert sweep_curves.best(found, METHODS[-1]) == METHODS[::-1][:12]
    figure = sweep_curves.curves(replace(comparison, baseline=METHODS[0]), Path())
    assert f"{len(METHODS) - 12} lines of {len(METHODS)} are not." in figure.text
    lines = drawn(figure.panels[0]).axes[0].get_lines()
    styles = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(styles) == len(lines) == 12
    assert lines[-1].get_label() == METHODS[0]


def test_names_lose_what_all_lines_have_and_stay_different():
    rate = "strategy.server_optimizer.learning_rate"
    labels = [UNTOUCHED, "fedit train.lr_scale=1 seed_of=2", f"fedadam {rate}=0.1 seed_of=2"]
    short = short_labels(labels)
    assert list(short.values()) == [UNTOUCHED, "fedit lr_scale=1", "fedadam learning_rate=0.1"]
    assert shortened(labels) == (
        f" All methods have seed_of=2. In the names, learning_rate is {rate}, lr_scale is "
        "train.lr_scale."
    )
    both = short_labels(["a train.stage1.lora_lr=1", "a train.stage2.lora_lr=1"])
    assert list(both.values()) == ["a stage1.lora_lr=1", "a stage2.lora_lr=1"]
    nested = short_labels(["a lr=1", "a train.lr=1"])
    assert list(nested.values()) == ["a lr=1", "a train.lr=1"]
    assert list(short_labels(["pilot x=1", "pilot"]).values()) == ["pilot x=1", "pilot"]
    assert shortened(["fedit", "pilot"]) == ""


def test_the_command_writes_a_sweeps_report(sweep, capsys):
    assert cli.main(["report", str(sweep), "--baseline", "fedit"]) == 0
    page = (sweep / "report" / "index.html").read_text()
    assert str(sweep / "report" / "index.html") in capsys.readouterr().out
    assert "difference to fedit" in page and "local-0: Disk full." in page
    assert "run folders are missing" in page
    assert {path.name for path in (sweep / "report").glob("*.png")} == {"seeds.png"}
    with (sweep / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5


def test_a_report_that_cannot_be_written_is_told_and_no_more(tmp_path, capsys, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'pilot-flwr: no memory' >&2\nexit 1\n")
    python.chmod(0o755)
    for program in (python, tmp_path / "nothing"):
        monkeypatch.setattr(sys, "executable", str(program))
        write_report(tmp_path / "run")
        err = capsys.readouterr().err
        assert "The report could not be written: " in err
        assert f"To retry: pilot-flwr report {tmp_path / 'run'}" in err
        assert ("no memory" in err) == (program == python)


def test_a_runs_report_has_no_baseline(finished, capsys):
    assert cli.main(["report", str(finished.folder.path), "--baseline", "fedit"]) == 2
    assert "`--baseline` needs a sweep" in capsys.readouterr().err
