"""The report of a sweep: every seed's score, and the methods' learning curves."""

import csv
import json
import shutil
import sys

import pytest

from pilot_flwr import cli
from pilot_flwr.commands.run import write_report
from pilot_flwr.report.sweep_report import MEAN, method_curves, seed_scores
from pilot_flwr.storage.run_folder import select
from pilot_flwr.sweeping.rows import as_csv, read_rows
from pilot_flwr.sweeping.table import UNTOUCHED, compare

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
    rows = read_rows(sweep)
    (comparison,) = compare(rows)
    done = [row for row in rows if row["status"] == "done"]
    found = seed_scores(comparison, done)
    for method, seeds in SCORES.items():
        assert found[method]["vqa"] == [scores[0] for scores in seeds.values()]
        assert found[method][MEAN] == pytest.approx([sum(s) / 2 for s in seeds.values()])
    assert found[UNTOUCHED]["vqa"] == [0.5, 0.5]


def test_curves_are_means_over_seeds_of_what_the_runs_recorded(finished, tmp_path):
    raised = {"a": 0.0, "b": 0.25}
    for job, more in raised.items():
        shutil.copytree(finished.folder.path, tmp_path / job)
        events = [
            e | {"score": e["score"] + more} if e["event"] == "evaluate" else e
            for e in finished.folder.events
        ]
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (tmp_path / job / "metrics.jsonl").write_text(lines)
    rows = [{"method": "pilot", "variant": "", "job": job} for job in (*raised, "gone")]
    curves = method_curves(rows, tmp_path)["pilot"]
    for number in (0, 1, 2):
        mine = [e for e in select(finished.folder.events, "evaluate", number) if e["task"] == "vqa"]
        right = sum(e["score"] * e["examples"] for e in mine) / sum(e["examples"] for e in mine)
        assert curves["vqa"][number] == pytest.approx(right + 0.125)
    assert set(curves) == {"vqa", "counting", MEAN}


def test_the_command_writes_a_sweeps_report(sweep, capsys):
    assert cli.main(["report", str(sweep), "--baseline", "fedit"]) == 0
    page = (sweep / "report" / "index.html").read_text()
    assert str(sweep / "report" / "index.html") in capsys.readouterr().out
    assert "difference to fedit" in page and "local-0: Disk full." in page
    assert "run folders are not here" in page
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
        assert f"To try again: pilot-flwr report {tmp_path / 'run'}" in err
        assert ("no memory" in err) == (program == python)


def test_a_runs_report_has_no_baseline(finished, capsys):
    assert cli.main(["report", str(finished.folder.path), "--baseline", "fedit"]) == 2
    assert "`--baseline` belongs to a sweep" in capsys.readouterr().err
