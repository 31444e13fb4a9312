"""``docs/deployment.md``, command by command, over loopback: TLS, node keys, three sites."""

import json
import re
import time

import pytest
import torch
from guide import wait_for_either, wait_until
from lab import SITES, SMALL, Lab

from pilot_flwr.results.runs import open_run, personal, personal_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_from_nothing_to_personalised_models(tmp_path):
    with Lab(tmp_path) as lab:
        lab.start_server()
        flower = {"north-hospital": "partition-id = 0\nnum-partitions = 3\n",
                  "south-hospital": "partition-id = 1\n"}  # fmt: skip
        for client, site in lab.sites.items():
            lab.prepare(site, more=flower.get(client, ""))
        stranger = lab.site("stranger", "vqa")
        lab.prepare(stranger)
        lab.start_sites()
        refusal = stranger.start("supernode")
        assert stranger.ended() != 0
        assert "Failed to initialize the connection to the SuperLink" in refusal.read_text()
        stranger.kill()
        lab.server.run("federation")
        said = lab.server.run("run", timeout=900, add=SMALL)
    folder = lab.server.folder / "runs" / "first"
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["failures"]) == ("completed", [])
    assert sorted(result["scores"]) == sorted(SITES)
    stages = {(e["round"], e["client"], e["stage"], e["task"]) for e in lab.events(folder, "train")}
    assert stages == {
        (n, client, 1 if n == 1 else 2, task) for n in (1, 2, 3) for client, task in SITES.items()
    }
    assert "Exchange 3: 3 clients, stage 2" in said
    assert "| **mean over tasks** |" in said
    run = open_run(folder)
    for client, site in lab.sites.items():
        (state,) = (site.folder / "state").iterdir()
        model = personal_model(run, personal(run, client, state=state), device=torch.device("cpu"))
        assert model.stage == 2


def test_a_site_that_dies_comes_back_under_its_own_name(tmp_path):
    """kill -9 in the middle of an exchange: it closes with the others, and a later one with all."""
    folder = tmp_path / "server" / "runs" / "first"
    with Lab(tmp_path) as lab:
        lab.start_server()
        for site in lab.sites.values():
            lab.prepare(site)
        lab.start_sites()
        lab.server.run("federation")
        lost = lab.sites["north-hospital"]

        def ordered() -> bool:
            return any(
                (e["round"], e["client"], e["phase"]) == (2, "north-hospital", "train")
                for e in lab.events(folder, "order")
            )

        words = f"{SMALL} strategy.rounds=5"
        command = lab.server.start("run", script=f"{lab.server.script('run')} {words}")
        wait_until(ordered, seconds=400)
        lost.kill()
        wait_until(lambda: lab.events(folder, "failure"), seconds=300)
        for _ in range(20):  # as systemd does: the server must have noticed first
            log = lost.start("supernode")
            if wait_for_either(log, "SuperNode ID", lost):
                break
            time.sleep(15)
        assert lab.server.ended(seconds=900) == 1, command.read_text()
    said = command.read_text()
    assert "The run failed." in said and "Client north-hospital failed in exchange 2" in said
    assert {e["client"] for e in lab.events(folder, "failure")} == {"north-hospital"}
    trained = {n: set() for n in range(1, 7)}
    for event in lab.events(folder, "train"):
        trained[event["round"]].add(event["client"])
        assert event["stage"] == (1 if event["round"] == 1 else 2)  # nothing was lost
    everyone = set(SITES)
    assert trained[1] == everyone and trained[2] == everyone - {"north-hospital"}
    assert trained[6] == everyone
    ids = re.findall(r"SuperNode ID: (\d+)", log.read_text())
    assert len(ids) == 2 and len(set(ids)) == 1
