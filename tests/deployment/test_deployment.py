"""``docs/how-to/deployment.md``, command by command, over loopback: TLS, node keys, three sites."""

import json
import re
import shutil
import ssl
import threading
import time
from contextlib import closing, contextmanager
from http.client import HTTPSConnection

import pytest
import torch
from guide import blocks, has_nginx, wait_for, wait_for_either, wait_until
from lab import SITES, SMALL, Lab

from pilot_flwr.client.session import SESSION_LOCK
from pilot_flwr.inference.runs import load_model, open_run, select_client
from pilot_flwr.run.atomic import hold
from pilot_flwr.site.service import status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("warm", [False, True], ids=["without services", "with services"])
def test_from_nothing_to_personalised_models(tmp_path, warm):
    with Lab(tmp_path, warm=warm) as lab:
        lab.start_server()
        flower = {"north-hospital": "partition-id = 0\nnum-partitions = 3\n",
                  "south-hospital": "partition-id = 1\n"}  # fmt: skip
        for client, site in lab.sites.items():
            lab.prepare(site, more=flower.get(client, ""))
        stranger = lab.site("stranger", "vqa")
        lab.prepare(stranger)
        (lab.server.folder / "keys" / "stranger.pub").unlink()
        lab.server.run("federation")
        for site in lab.sites.values():
            shutil.copy(lab.server.folder / "federation.yaml", site.folder)
        assert "A run can start." in lab.sites["west-clinic"].run("check")
        lab.start_sites()
        refusal = stranger.start("supernode")
        assert stranger.ended() != 0
        assert "Failed to initialize the connection to the SuperLink" in refusal.read_text()
        stranger.kill()
        said = lab.server.run("run", timeout=900, add=SMALL)
        found = {client: status(site.folder / "state") for client, site in lab.sites.items()}
        if not warm:
            exchange_key(lab, lab.sites["north-hospital"])
    for client, service in found.items():  # three exchanges and the closing evaluation
        assert (service.turns, service.warm) == (4, True) if warm else service is None, client
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
        (state,) = (site.folder / "state").glob("demo-*")
        model = load_model(run, select_client(run, client, state=state), device=torch.device("cpu"))
        assert model.stage == 2


def exchange_key(lab, site):
    """Remove a site: it is refused. Register another key of it: it is taken."""
    log = site.folder / "supernode.log"
    (node,) = re.findall(r"SuperNode ID: (\d+)", log.read_text())
    site.kill()
    text = f"NODE_ID={node}\n{blocks()['server.unregister']}"
    lab.server.run_script(lab.server.own_script(text))
    site.start("supernode")
    assert site.ended() != 0  # no waiting helps, unlike after a crash
    for name in ("node-key", "node-key.pub"):
        (site.folder / name).unlink()
    site.run("key")
    shutil.copy(site.folder / "node-key.pub", lab.server.folder / "keys" / "north-hospital.pub")
    words = 'flwr supernode register "$SERVER/keys/north-hospital.pub" pilot --name north-hospital'
    lab.server.run_script(lab.server.own_script(words))
    site.start("supernode")
    wait_until(lambda: len(re.findall(r"SuperNode ID: (\d+)", log.read_text())) == 2, seconds=180)
    assert len(set(re.findall(r"SuperNode ID: (\d+)", log.read_text()))) == 2


@contextmanager
def supervised(sites):
    """Start a site's SuperNode again whenever it has ended, as systemd does."""
    enough = threading.Event()

    def look():
        while not enough.wait(10):
            for site in sites:
                if not site.is_running():
                    site.kill()  # what it has left behind
                    site.start("supernode")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def test_a_server_that_dies_goes_on(tmp_path):
    """kill -9 of all that the server runs; a new certificate; nobody does anything at the sites."""
    folder = tmp_path / "server" / "runs" / "first"
    with Lab(tmp_path) as lab:
        lab.start()
        lab.server.start("run", script=f"{lab.server.script('run')} {SMALL}")
        wait_until(lambda: len(lab.events(folder, "order")) == 6, seconds=400)
        lab.server.kill()
        assert not (folder / "result.json").exists()
        lab.server.run("certificate")
        lab.serve()
        lab.server.run("register")
        with supervised(lab.sites.values()):
            logs = [site.folder / "supernode.log" for site in lab.sites.values()]
            wait_until(
                lambda: all(log.read_text().count("SuperNode ID") == 2 for log in logs), seconds=400
            )
            said = lab.server.run("resume", timeout=900, add=SMALL)
    assert "Exchange 2: 3 clients, stage 2" in said and "Exchange 1: 3" not in said
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["failures"], result["resumed"]) == ("completed", [], 1)
    trained = [(e["round"], e["client"]) for e in lab.events(folder, "train")]
    assert sorted(trained) == [(n, client) for n in (1, 2, 3) for client in sorted(SITES)]


def test_a_site_that_is_late_is_left_out_and_taken_back(tmp_path):
    """Its first session waits for the lock of its state folder, which this test holds."""
    folder = tmp_path / "server" / "runs" / "first"
    rule = "strategy.close_after.fraction=0.6 strategy.close_after.grace_seconds=40"
    with Lab(tmp_path) as lab:
        lab.start()
        lab.server.start("run", script=f"{lab.server.script('run')} {SMALL} {rule}")
        wait_until(lambda: len(lab.events(folder, "order")) == 3, seconds=400)
        (state,) = (lab.sites["west-clinic"].folder / "state").glob("demo-*")
        with hold(state / SESSION_LOCK, "the state folder"):
            wait_until(lambda: lab.events(folder, "round"), seconds=300)
        wait_until(lambda: (folder / "result.json").exists(), seconds=600)
    failure = lab.events(folder, "failure")[0]  # a loaded machine may have other late sites
    assert (failure["round"], failure["client"]) == (1, "west-clinic")
    assert "2 of 3 clients had answered; the exchange closed" in failure["reason"]
    warnings = [e for e in lab.events(folder, "warning") if "exchange 1" in e["text"]]
    assert {event["client"] for event in warnings} == {"west-clinic"}
    late = warnings[-1]
    assert late["text"].startswith("answered exchange 1 after") and sum(late["up"].values()) > 0
    busy = {event["round"] for event in warnings if "still works" in event["text"]}
    asked = {e["round"] for e in lab.events(folder, "order") if e["client"] == "west-clinic"}
    assert busy and asked.isdisjoint(busy)
    stages = [e["stage"] for e in lab.events(folder, "train") if e["client"] == "west-clinic"]
    assert set(stages) == {2}  # its stage 1 is done, although it was not used
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"


@pytest.mark.skipif(not has_nginx(), reason="needs nginx")
def test_the_gateway_passes_on_what_sites_ask_for_and_nothing_else(tmp_path):
    with Lab(tmp_path, gateway=True) as lab:
        lab.start_server()
        trust = ssl.create_default_context(cafile=lab.server.folder / "tls" / "ca.crt")

        def ask(port, path: str) -> int:
            with closing(HTTPSConnection("localhost", int(port), context=trust)) as connection:
                connection.request("POST", path, body=b"", headers={"Content-Length": "0"})
                return connection.getresponse().status

        link = lab.server.values["LINK_PORT"]
        for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/", "/"):
            assert ask(lab.port, path) == 403
        assert ask(link, "/v1/control/list-nodes") not in (403, 404)  # where the command line goes
        fleet = "/v1/fleet/activate-node"
        assert ask(lab.port, fleet) == ask(link, fleet) not in (403, 404)


def test_a_site_that_dies_comes_back_under_its_own_name(tmp_path):
    """kill -9 in the middle of an exchange: it closes with the others, and a later one with all.

    Meanwhile another registered site claims its id, in a run without the operator's file of keys.
    """
    folder = tmp_path / "server" / "runs" / "first"
    with Lab(tmp_path) as lab:
        lab.start_server()
        lost, impostor = lab.sites["north-hospital"], lab.site("impostor", "vqa")
        for site in (*lab.sites.values(), impostor):
            lab.prepare(site)
        settings = impostor.folder / "site.toml"
        settings.write_text(settings.read_text().replace('"impostor"', '"north-hospital"', 1))
        lab.start_sites()
        lab.server.run("federation")

        def ordered() -> bool:
            return any(
                (e["round"], e["client"], e["phase"]) == (2, "north-hospital", "train")
                for e in lab.events(folder, "order")
            )

        words = f"{SMALL} strategy.rounds=5 strategy.client_keys=''"
        command = lab.server.start("run", script=f"{lab.server.script('run')} {words}")
        wait_until(ordered, seconds=400)
        lost.kill()
        wait_for(impostor.start("supernode"), "SuperNode ID", impostor)
        wait_until(lambda: lab.events(folder, "failure"), seconds=300)
        for _ in range(20):  # as systemd does: the server must have noticed first
            log = lost.start("supernode")
            if wait_for_either(log, "SuperNode ID", lost):
                break
            time.sleep(15)
        assert lab.server.ended(seconds=900) == 1, command.read_text()
    said = command.read_text()
    assert "The run failed." in said and "Client north-hospital failed in exchange 2" in said
    (node,) = re.findall(r"SuperNode ID: (\d+)", (impostor.folder / "supernode.log").read_text())
    failures = lab.events(folder, "failure")
    assert {e["client"] for e in failures} == {"north-hospital", f"node {node}"}
    refused = [e["reason"] for e in failures if e["client"] == f"node {node}"]
    assert refused and all("'north-hospital', whose key is SHA256:" in text for text in refused)
    assert not list((impostor.folder / "state").rglob("private*"))  # it was asked for nothing
    trained = {n: set() for n in range(1, 7)}
    for event in lab.events(folder, "train"):
        trained[event["round"]].add(event["client"])
        assert event["stage"] == (1 if event["round"] == 1 else 2)  # nothing was lost
    everyone = set(SITES)
    assert trained[1] == everyone and trained[2] == everyone - {"north-hospital"}
    assert trained[6] == everyone
    ids = re.findall(r"SuperNode ID: (\d+)", log.read_text())
    assert len(ids) == 2 and len(set(ids)) == 1
