"""What a client of LLaVA-1.5-7B sends, through a whole deployment."""

import importlib
import json

import pytest
from guide import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_a_7b_models_payload_passes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    payload = importlib.import_module("payload")
    output = tmp_path / "payload.json"
    results = payload.main(["--output", str(output)])
    assert list(results) == ["cold", "warm"]
    assert json.loads(output.read_text())["results"] == results
    for mode, trainer in (("cold", "flwr-clientapp"), ("warm", "pilot_flwr.site.worker")):
        check(results[mode], trainer, least=2 * payload.SENT_BY_7B)  # bfloat16


def check(results, trainer, *, least):
    first, second = results["exchanges"]
    assert (first["stage"], second["stage"]) == (1, 2)
    for exchange in (first, second):
        assert least <= exchange["up_bytes"] < 1.001 * least
        assert exchange["down_bytes"] >= least
        assert exchange["times_plain"] > 1
        assert all(seconds > 0 for seconds in exchange["plain_seconds"].values())
    assert second["down_bytes"] > first["down_bytes"]  # with the other tasks' adapters
    # In every process that had it, it was once; below it, nothing was measured.
    programs = results["peak_bytes_by_program"]
    assert programs["server"]["flwr-serverapp"] > least < programs["client"][trainer]
    assert max(programs["server"].values()) <= results["peak_bytes"]["server"] < 16e9
    assert max(programs["client"].values()) <= results["peak_bytes"]["client"] < 16e9
