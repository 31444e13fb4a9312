"""``docs/deployment.md``, command by command, over loopback: TLS, node keys, three sites."""

import json

import pytest
import torch
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
        (n, client, 1 if n == 1 else 2, task)
        for n in (1, 2, 3)
        for client, task in SITES.items()
    }
    assert "Exchange 3: 3 clients, stage 2" in said
    assert "| **mean over tasks** |" in said
    run = open_run(folder)
    for client, site in lab.sites.items():
        (state,) = (site.folder / "state").iterdir()
        model = personal_model(run, personal(run, client, state=state), device=torch.device("cpu"))
        assert model.stage == 2
