"""The deployment of ``docs/how-to/deployment.md`` on this machine: a server and sites with data."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import guide
from guide import Machine, free_port, wait_for, wait_for_either, wait_for_port, wait_until
from llava_files import write_federation

SITES = {"north-hospital": "vqa", "south-hospital": "counting", "west-clinic": "captioning"}
SMALL = "train.epochs=1 train.batch_size=4 evaluation.max_new_tokens=4 strategy.num_neighbors=1"

SERVE = 'cd "$SITE"; pilot-flwr site serve --node-config site.toml'


class Lab:
    """A server and sites, each with its own folder, data and task; nothing runs yet.

    `sites` has each site's task, by its name; every site has `train` and `test` examples. The
    gateway is there if nginx is, or as `gateway` says. With `warm`, every site runs its service.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sites: Mapping[str, str] = SITES,
        gateway: bool | None = None,
        warm: bool = False,
        train: int = 12,
        test: int = 4,
    ) -> None:
        self.folder = folder
        self.gateway = guide.has_nginx() if gateway is None else gateway
        (folder / "data").mkdir(parents=True)
        write_federation(
            folder / "data", tasks=tuple(sites.values()), train=train, test=test, clients=1
        )
        link = free_port()
        self.port = free_port() if self.gateway else link  # without a gateway: straight on
        home = folder / "server"
        names = {"HOST": "localhost", "PORT": self.port, "LINK_PORT": link, "SERVER": home}
        self.server = Machine("server", home, names)
        self.made: list[Machine] = []
        self.sites = {client: self.site(client, task) for client, task in sites.items()}
        self.services = {c: self.service(site) for c, site in self.sites.items() if warm}

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for machine in (*self.made, self.server):
            machine.kill()

    def site(self, client: str, task: str, *, port: int = 0) -> Machine:
        """Return a site that is not prepared; it is killed at the end, started or not."""
        home = self.folder / client
        values = {
            "HOST": "localhost",
            "PORT": port or self.port,
            "NODE_PORT": free_port(),
            "SITE": home,
            "DATA": self.folder / "data" / task,
            "CLIENT": client,
            "TASK": task,
        }
        self.made.append(Machine("site", home, values))
        return self.made[-1]

    def service(self, site: Machine) -> Machine:
        """Return a site again, for its warm service: another unit, which dies on its own."""
        self.made.append(Machine("site", site.folder, site.values))
        return self.made[-1]

    def start_server(self) -> None:
        """Steps 2 to 4 of the page."""
        self.server.run("authority")
        self.server.run("certificate")
        self.serve()
        self.server.run("connection")

    def serve(self) -> None:
        """Start the SuperLink, again if need be, and the gateway."""
        log = self.server.start("superlink")
        wait_for_either(log, "Uvicorn running", self.server)
        assert self.server.is_running(), log.read_text()
        if self.gateway:
            self.server.start("gateway")
            wait_for_port(self.port, self.server)

    def prepare(self, site: Machine, *, more: str = "") -> None:
        """Step 5, the keys' exchange, and the node config of step 7 with `more` lines."""
        site.run("key")
        key = self.server.folder / "keys" / f"{site.values['CLIENT']}.pub"
        shutil.copy(site.folder / "node-key.pub", key)
        shutil.copy(self.server.folder / "tls" / "ca.crt", site.folder / "ca.crt")
        site.run("node")
        with (site.folder / "site.toml").open("a") as file:
            file.write(more)

    def start_sites(self) -> None:
        """Step 6, the sites' services if they are warm, and the SuperNodes of step 7."""
        self.server.run("register")
        for service in self.services.values():
            start_service(service)
        logs = {site: site.start("supernode") for site in self.sites.values()}
        for site, log in logs.items():
            wait_for(log, "SuperNode ID", site)

    def start(self) -> None:
        """Steps 2 to 7 with all sites, and the federation of step 8."""
        self.start_server()
        for site in self.sites.values():
            self.prepare(site)
        self.start_sites()
        self.server.run("federation")

    def events(self, run: Path, kind: str) -> list[dict]:
        """Return the events of one kind of a run folder, which may not be there yet."""
        file = run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]


def start_service(service: Machine) -> None:
    """Start a site's warm service and wait until it accepts messages."""
    service.start(
        "serve", script=service.own_script(SERVE)
    )  # the block site.serve, once it is there
    socket = service.folder / "state" / "worker.sock"
    wait_until(lambda: socket.exists() or not service.is_running(), seconds=60)
    assert service.is_running(), (service.folder / "serve.log").read_text()
