"""A run is called a success only if Flower and the app both say so, in full."""

import json
from pathlib import Path

import pytest

from pilot_flwr.run.events import ClientFailed
from pilot_flwr.run.outcome import RunStatus, evaluate_outcome

DONE = RunStatus("finished:completed", "N/A")
GOOD = {"status": "completed", "error": None, "failures": [], "scores": {}}
FAILURE = {"round": 2, "phase": "train", "client": "vqa-1", "reason": "ValueError: no"}


def write(folder: Path, result: object) -> Path:
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_success_needs_both(tmp_path: Path):
    outcome = evaluate_outcome(DONE, write(tmp_path, GOOD))
    assert outcome.succeeded
    assert outcome.explanation == ()


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped", "running", ""])
def test_flower_disagrees(tmp_path: Path, status):
    outcome = evaluate_outcome(RunStatus(status), write(tmp_path, GOOD))
    assert not outcome.succeeded
    assert f"Flower's status of the run: {status or 'unknown'}." in outcome.explanation


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({**GOOD, "status": "failed"}, "result is 'failed'"),
        ({**GOOD, "status": None}, "result is 'None'"),
        ({**GOOD, "error": "disk full"}, "disk full"),
        ({**GOOD, "failures": None}, "no list of `failures`"),
        ({"status": "completed"}, "no list of `failures`"),
        ([GOOD], "not a JSON object"),
        ({**GOOD, "failures": [FAILURE]}, "Client vqa-1 failed in exchange 2 (train): Value"),
        ({**GOOD, "failures": ["odd"]}, "Client ? failed in exchange ? (?): odd"),
    ],
)
def test_the_app_disagrees(tmp_path: Path, result, words):
    outcome = evaluate_outcome(DONE, write(tmp_path, result))
    assert not outcome.succeeded
    assert words in "\n".join(outcome.explanation)
    assert outcome.explanation[-1] == f"Full log: {tmp_path / 'logs' / 'flower.log'}"


def test_a_torn_result(tmp_path: Path):
    (tmp_path / "result.json").write_text('{"status": "compl')
    outcome = evaluate_outcome(DONE, tmp_path)
    assert not outcome.succeeded
    assert "cannot be read" in outcome.explanation[0]


def test_without_a_result_the_reported_failures_and_flowers_details_explain(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "failure", **FAILURE}) + "\n")
    details = "Simulation failed with exception: no client left"
    outcome = evaluate_outcome(RunStatus("finished:failed", details), tmp_path)
    assert outcome.explanation[:2] == (
        "Client vqa-1 failed in exchange 2 (train): ValueError: no",
        "no client left",
    )
    assert not any("The end of" in line for line in outcome.explanation)


def test_without_any_explanation_the_end_of_the_log_is_shown(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "superlink.log").write_text("\x1b[91mport taken\x1b[0m\n\n")
    outcome = evaluate_outcome(RunStatus("running", "The SuperLink ended."), tmp_path)
    assert outcome.explanation[0] == "The SuperLink ended."
    assert "The end of superlink.log:" in outcome.explanation
    assert "  | port taken" in outcome.explanation
    (tmp_path / "logs" / "flower.log").write_text("".join(f"line {i}\n" for i in range(99)))
    shown = evaluate_outcome(RunStatus("running", "The SuperLink ended."), tmp_path).explanation
    assert "The end of flower.log:" in shown
    assert "  | line 98" in shown
    assert "  | line 80" not in shown


def test_many_failures_are_summed_up(tmp_path: Path):
    outcome = evaluate_outcome(DONE, write(tmp_path, {**GOOD, "failures": [FAILURE] * 9}))
    assert "... and 4 more failures." in outcome.explanation


def test_an_error_with_a_traceback_is_reduced_to_its_last_exception(tmp_path: Path):
    error = 'Traceback:\n  File "x.py", line 1\nRuntimeError: all clients failed\n'
    outcome = evaluate_outcome(DONE, write(tmp_path, {**GOOD, "error": error}))
    assert outcome.explanation[0] == "RuntimeError: all clients failed"


def test_what_app_and_flower_both_say_is_said_once(tmp_path: Path):
    folder = write(tmp_path, {**GOOD, "status": "failed", "error": "RunError: no client left"})
    details = "Simulation failed with exception: no client left"
    explanation = evaluate_outcome(RunStatus("finished:failed", details), folder).explanation
    assert [line for line in explanation if "no client left" in line] == [
        "RunError: no client left"
    ]


@pytest.mark.parametrize(
    ("status", "result", "restartable"),
    [
        (RunStatus("running", "The SuperLink ended.", lost=True), None, True),
        (RunStatus("finished:failed"), {**GOOD, "status": "failed", "restartable": True}, True),
        (RunStatus("finished:failed"), {**GOOD, "status": "failed", "restartable": False}, False),
        (RunStatus("finished:failed"), {**GOOD, "status": "failed", "restartable": "yes"}, False),
        (RunStatus("finished:failed"), None, False),
        (RunStatus("running", "Flower did not start the simulation."), None, False),
    ],
)
def test_a_run_may_go_on_by_itself_only_if_a_process_died(tmp_path, status, result, restartable):
    if result is not None:
        write(tmp_path, result)
    outcome = evaluate_outcome(status, tmp_path)
    assert (outcome.succeeded, outcome.restartable) == (False, restartable)


def test_a_run_that_died_after_a_failure_still_shows_the_end_of_its_log(tmp_path):
    event = ClientFailed(exchange=1, phase="train", client="a", reason="No reply.")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event.to_dict()) + "\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "flower.log").write_text("OUT OF MEMORY\n")
    outcome = evaluate_outcome(RunStatus("running", "It ended.", lost=True), tmp_path)
    assert any("OUT OF MEMORY" in line for line in outcome.explanation)
    assert any("No reply." in line for line in outcome.explanation)
