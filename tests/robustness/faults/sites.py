"""Kill what runs at real sites at random points, and compare with an undisturbed federation.

Three sites over TLS, with their warm services, train in ten exchanges. SIGKILL hits, at points
drawn from a seed, half of them while the site's session runs,

- the worker process of a site's service;
- the service itself;
- the ClientApp that Flower has started for a message;
- the SuperNode.

What has ended is started again after a pause, as systemd does. A killed session is a client that
fails; with ``strategy.below_minimum=wait`` and as many ``strategy.min_replies`` as sites the
exchange is repeated until all have taken part. So the result must equal, bit for bit, that of a
federation of the same sites in one process, without Flower's programs, a service or a kill:
checkpoints, private states, mixing matrices, events without times, scores and tables. After every
kill the site's newest private state is read, which verifies its checksum.

Run ``python tests/robustness/faults/sites.py`` (about 15 minutes) to update
``benchmarks/results/site_faults.json``. Progress goes to standard output, logs to ``--folder``.
"""

import argparse
import itertools
import json
import random
import shlex
import shutil
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

TESTS = Path(__file__).resolve().parents[2]
for _folder in (TESTS / "deployment", TESTS, TESTS / "robustness"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

from guide import Machine  # noqa: E402
from lab import SERVE, SITES, Lab  # noqa: E402

from faults.sameness import differences  # noqa: E402

BENCHMARKS = TESTS.parent / "benchmarks"
RESULT = BENCHMARKS / "results" / "site_faults.json"
KINDS = ("worker", "service", "ClientApp", "SuperNode")
PROGRAM = {
    "worker": "pilot_flwr.site.worker",
    "service": "pilot-flwr",
    "ClientApp": "flwr-clientapp",
    "SuperNode": "flower-supernode",
}
SETTINGS = (
    "train.epochs=8 train.batch_size=4 evaluation.max_new_tokens=4 strategy.num_neighbors=1 "
    f"strategy.min_replies={len(SITES)} strategy.below_minimum=wait"
)
RESTART_SECONDS = {"SuperNode": 10.0, "service": 2.0}
"""Pause before a program is started again; the units of the guide have one, too."""

LONGEST_DELAY = {False: 8.0, True: 1.5}
"""Seconds from an instruction, or the start of a session (True), to the latest kill."""

LIMIT_SECONDS = 1800.0
Found = TypeVar("Found")


@dataclass(frozen=True)
class Kill:
    """What is killed at which site, and when.

    `delay` is in seconds from an exchange's first instruction or, if `in_session`, from the start
    of the site's session.
    """

    kind: str
    site: str
    exchange: int
    in_session: bool
    delay: float


def draw_kills(draw: random.Random, kills: int, exchanges: int, kinds: Sequence[str]) -> list[Kill]:
    """Draw points: as many kills of each kind, and of an exchange at most one per site.

    A killed ClientApp or SuperNode is noticed after a minute. So that not every exchange takes
    that long, they are killed in the same exchanges: three of these kills or one quick one each.
    """
    order = [kind for kind, _ in zip(itertools.cycle(kinds), range(kills), strict=False)]
    slow = [kind for kind in order if kind in ("ClientApp", "SuperNode")]
    quick = [kind for kind in order if kind not in slow]
    draw.shuffle(slow)
    groups = [slow[at : at + len(SITES)] for at in range(0, len(slow), len(SITES))]
    groups += [[] for _ in range(exchanges - len(groups))]
    draw.shuffle(groups)
    for kind in quick:
        min(groups, key=lambda group: (len(group), draw.random())).append(kind)
    found = []
    for exchange, group in enumerate(groups, start=1):
        if len(group) > len(SITES):
            raise SystemExit(f"{kills} kills do not fit into {exchanges} exchanges.")
        for kind, site in zip(group, draw.sample(sorted(SITES), len(group)), strict=True):
            in_session = draw.random() < 0.5
            delay = draw.uniform(0, LONGEST_DELAY[in_session])
            found.append(Kill(kind, site, exchange, in_session, delay))
    return found


def measure(
    folder: Path, *, kills: int, exchanges: int, seed: int, warm: bool = True
) -> dict[str, Any]:
    """Run a federation with kills, the same one undisturbed, and compare.

    Parameters
    ----------
    folder : Path
        Folder for both; it must not exist.
    kills : int
        Number in all.
    exchanges : int
        Of the run.
    seed : int
        Seed of the points.
    warm : bool
        Whether the sites have services; without, worker and service are not killed.
    """
    kinds = KINDS if warm else KINDS[2:]
    planned = draw_kills(random.Random(seed), kills, exchanges, kinds)
    began = time.monotonic()
    words = f"{SETTINGS} strategy.rounds={exchanges - 1}"
    with Lab(folder, gateway=False, warm=warm) as lab:
        lab.start()
        run = lab.server.folder / "runs" / "first"
        command = lab.server.start("run", script=f"{lab.server.script('run')} {words}")
        with supervised(lab):
            with ThreadPoolExecutor(len(planned)) as pool:
                done = list(pool.map(lambda kill: carry_out(lab, run, kill), planned))
            if lab.server.ended(seconds=LIMIT_SECONDS) != 0:
                raise SystemExit(command.read_text())
    seconds = time.monotonic() - began
    reference = folder / "reference"
    run_undisturbed(lab, reference, words)
    for client, site in lab.sites.items():
        (state,) = (site.folder / "state").glob("demo-*")
        shutil.copytree(state, run / "clients" / client)
    found = differences(reference, run)
    repeats = Counter(event["round"] for event in lab.events(run, "repeat"))
    return {
        "settings": words,
        "seed": seed,
        "sites": len(SITES),
        "exchanges": exchanges,
        "kills": len(done),
        "kills_by_kind": dict(Counter(kill["kind"] for kill in done)),
        "kills_in_a_session": sum(kill["in_a_session"] for kill in done),
        "repeated_exchanges": len(repeats),
        "repetitions": sum(repeats.values()),
        "private_states_read": sum(kill["private_state"] is not None for kill in done),
        "differences": found,
        "seconds": round(seconds, 1),
        "each": done,
    }


def carry_out(lab: Lab, run: Path, kill: Kill) -> dict[str, Any]:
    """Wait for the point, kill, and read the site's newest private state."""
    orders: list[float] = []

    def ordered() -> bool:
        for event in lab.events(run, "order"):
            if (event["round"], event["phase"]) == (kill.exchange, "train"):
                orders.append(_began(run) + event["elapsed"])
        return bool(orders)

    poll(lab, ordered)
    if kill.in_session:
        poll(lab, lambda: in_session(lab, kill.site))
        time.sleep(kill.delay)
    else:
        time.sleep(max(0.0, orders[0] + kill.delay - time.time()))
    victim = poll(lab, lambda: find(lab, kill))
    hit = in_session(lab, kill.site)
    victim.kill()
    described = {
        "kind": kill.kind,
        "site": kill.site,
        "exchange": kill.exchange,
        "seconds_after_the_instruction": round(time.time() - orders[0], 1),
        "in_a_session": hit,
        "private_state": read_private_state(lab, kill.site),
    }
    print(described, flush=True)
    return described


def poll(lab: Lab, find: Callable[[], Found | None]) -> Found:
    """Return what `find` finds, as soon as that is anything; fail if the run ends before."""
    while not (found := find()):
        assert lab.server.is_running(), (lab.server.folder / "run.log").read_text()
        time.sleep(0.02)
    return found


def in_session(lab: Lab, client: str) -> bool:
    """Return whether a process holds the lock of a site's session, as the kernel says."""
    from pilot_flwr.client.session import SESSION_LOCK

    files = (lab.sites[client].folder / "state").glob(f"demo-*/{SESSION_LOCK}")
    inodes = {str(file.stat().st_ino) for file in files}
    locks = Path("/proc/locks").read_text().splitlines()
    return not inodes.isdisjoint(line.split()[-3].rsplit(":", 1)[-1] for line in locks)


def find(lab: Lab, kill: Kill) -> psutil.Process | None:
    """Return the newest process of a kind at a site: None if none runs at this moment."""
    machine = (lab.services if kill.kind in ("worker", "service") else lab.sites)[kill.site]
    found = [process for process in machine.processes() if _runs(process, kill.kind)]
    return found[-1] if found else None


def _runs(process: psutil.Process, kind: str) -> bool:
    """Return whether a process runs a program, also as a script of Python."""
    with suppress(psutil.Error):
        words = process.cmdline()[:4]
        return PROGRAM[kind] in {word.rsplit("/", 1)[-1] for word in words}
    return False


def read_private_state(lab: Lab, client: str) -> int | None:
    """Return the exchange of a site's newest private state, None if it has none yet.

    Raises `StateError` if it is not whole.
    """
    from pilot_flwr.client.private_state import PrivateStore

    for folder in (lab.sites[client].folder / "state").glob("demo-*"):
        store = PrivateStore(folder, client, SITES[client])
        if rounds := store.rounds():
            store.load()
            return rounds[-1]
    return None


@contextmanager
def supervised(lab: Lab) -> Iterator[None]:
    """Start SuperNodes and services again when they have ended, after a pause, as systemd does."""
    enough = threading.Event()

    def watch(machine: Machine, kind: str) -> None:
        while not enough.wait(0.2):
            if not machine.is_running():
                machine.kill()  # what it has left behind
                if enough.wait(RESTART_SECONDS[kind]):
                    return
                if kind == "service":
                    machine.start("serve", script=machine.own_script(SERVE))
                else:
                    machine.start("supernode")

    machines = [(machine, "SuperNode") for machine in lab.sites.values()]
    machines += [(machine, "service") for machine in lab.services.values()]
    threads = [threading.Thread(target=watch, args=arguments) for arguments in machines]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def run_undisturbed(lab: Lab, folder: Path, words: str) -> None:
    """Run the same sites in this process, with their node configs but other state folders."""
    from pilot_flwr.client_app import app
    from pilot_flwr.config.loading import load_config
    from pilot_flwr.config.overrides import expand
    from pilot_flwr.flower.grid import InProcessGrid, torch_threads
    from pilot_flwr.server_app import run

    configs = []
    for client, site in lab.sites.items():
        config = tomllib.loads((site.folder / "site.toml").read_text())
        state = folder.parent / "reference-states" / client
        state.mkdir(parents=True)
        configs.append(config | {"state-folder": str(state)})
    server = lab.server.folder
    given = [
        f"data={server}/federation.yaml",
        f"strategy.clients={len(SITES)}",
        f"strategy.client_keys={server}/client-keys",
        *shlex.split(words),
        f"run.folder={folder}",
    ]
    overrides = shlex.join(expand(given))
    grid = InProcessGrid(app, node_configs=configs, overrides=overrides, threads=1)
    with torch_threads(1):
        run(grid, load_config(overrides), overrides, flower_run="1")
    for config in configs:
        (state,) = Path(config["state-folder"]).glob("demo-*")
        shutil.copytree(state, folder / "clients" / config["client-id"])


def _began(run: Path) -> float:
    return (run / ".token").stat().st_mtime


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills in all")
    parser.add_argument("--exchanges", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="sites without services")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(
            options.folder or Path(scratch) / "lab",
            kills=options.kills,
            exchanges=options.exchanges,
            seed=options.seed,
            warm=not options.cold,
        )
    print(json.dumps(results, indent=2))
    sys.path.insert(0, str(BENCHMARKS))
    from _record import write_record

    write_record(options.output, results, packages=["flwr", "torch"])
    return results


if __name__ == "__main__":
    main()
