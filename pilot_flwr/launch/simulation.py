"""Run a prepared simulation, with automatic restarts, in the configured engine.

The in-process engine is `pilot_flwr.launch.in_process`. For Flower's engine, `launch` starts a
SuperLink in a scratch folder, submits the app, follows its log and status, detects dead processes,
and leaves nothing running: ``flwr run`` alone would leave a SuperLink with the first run's
environment, and reinstall the app's dependencies. To add an engine, declare it in
`pilot_flwr.config.schema` and call it in `run_prepared`.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from psutil import Process  # type: ignore[import-untyped, unused-ignore]

from pilot_flwr.config.overrides import path_override
from pilot_flwr.errors import RunError
from pilot_flwr.formatting import count
from pilot_flwr.launch import ray_cluster
from pilot_flwr.launch.flower_cli import FlowerCLI, app_folder, flower_environment, is_healthy
from pilot_flwr.launch.prepare import IN_PROCESS, Prepared
from pilot_flwr.launch.processes import ProcessSandbox, StopSignals, free_port, is_alive, listens
from pilot_flwr.run.atomic import hold, write_text
from pilot_flwr.run.outcome import Outcome, RunStatus, evaluate_outcome
from pilot_flwr.run.progress import ProgressPrinter
from pilot_flwr.run.provenance import keep_provenance
from pilot_flwr.server.resume import OVERRIDES

LAUNCH_LOCK = ".launch.lock"
"""Lock file in a run folder, held by the ``pilot-flwr run`` working in it."""

CONNECTION = "pilot"
QUERY_SECONDS = 30.0
START_SECONDS = 120.0
FINISH_SECONDS = 120.0

Out = Callable[[str], None]


def run_prepared(prepared: Prepared, *, out: Out, verbose: bool = False) -> Outcome:
    """Run a simulation to completion; `out` receives the lines of the live output.

    Raises `PilotError` if the run cannot start or another process holds its folder, and
    `pilot_flwr.launch.processes.Interrupted` on a signal; nothing is left running.
    """
    config, folder = prepared.config, prepared.folder
    doing = "resuming in run folder" if prepared.resumed else "run folder"
    out(f"{config.name}: {config.num_clients} clients, {doing} {folder}")
    address, federation = prepared.address, prepared.federation
    if address:
        found, federation = ray_cluster.check_cluster(config, address, folder)
        address = found.address
        out(found.describe(config.simulation))
    attempt: Callable[..., Outcome]
    if config.simulation.engine == IN_PROCESS:
        from pilot_flwr.launch.in_process import run_in_process

        attempt = run_in_process
    else:
        out("Starting Flower and Ray. First results appear after about 30 seconds.")
        attempt = partial(launch, federation=federation, address=address)
    attempt = partial(attempt, folder=folder, out=out, verbose=verbose)
    with hold(folder / LAUNCH_LOCK, f"The run folder {folder}"):
        if not prepared.resumed:  # recorded first: resuming needs both
            write_text(folder / OVERRIDES, prepared.overrides + "\n")
            keep_provenance(folder)
        return _run_attempts(attempt, prepared, out)


def _run_attempts(attempt: Callable[..., Outcome], prepared: Prepared, out: Out) -> Outcome:
    """Run; if a process dies, resume from the last checkpoint, up to `run.restarts` times.

    Errors in the run itself, such as too few replies, are not retried.
    """
    overrides, resumed = prepared.overrides, prepared.resumed
    restarts = prepared.config.run.restarts
    for number in range(restarts + 1):
        archive_attempt(prepared.folder)
        outcome = attempt(overrides, resumed=resumed)
        if outcome.succeeded or not outcome.restartable or number == restarts:
            return outcome
        cause = "".join(f"\n  {line}" for line in outcome.explanation[:2])
        out(f"\nA process of the simulation died:{cause}")
        nth = f"Restart {number + 1} of at most {restarts}"
        out(f"{nth} (`run.restarts`), from the last checkpoint.")
        if not resumed:
            overrides = f"{overrides} {shlex.join([path_override('resume', prepared.folder)])}"
        resumed = True
    raise AssertionError("the last attempt returns")


def archive_attempt(folder: Path) -> None:
    """Move an attempt's logs and its ``result.json`` to ``logs/attempt-N/``."""
    logs = folder / "logs"
    left = [p for p in logs.glob("*") if not p.name.startswith("attempt-")]
    left += [path for path in [folder / "result.json"] if path.exists()]
    if not left:
        return
    numbers = [int(p.name[8:]) for p in logs.glob("attempt-*") if p.name[8:].isdigit()]
    target = logs / f"attempt-{max(numbers, default=0) + 1}"
    target.mkdir(parents=True)
    for path in left:
        path.rename(target / path.name)


def launch(
    overrides: str,
    folder: Path,
    *,
    federation: str,
    out: Out,
    verbose: bool = False,
    address: str = "",
    resumed: bool = False,
) -> Outcome:
    """Make one attempt at a run with Flower's simulation engine.

    `address` names an existing Ray cluster. If `resumed`, the events recorded before are not
    printed again.
    """
    if address and resumed:  # a machine may have died: wait until Ray knows which remain
        found = ray_cluster.inspect_cluster(address, folder)
        out(f"The Ray cluster has {count(len(found.nodes), 'machine')} now.")
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / "flower.log" if verbose else None
    printer = ProgressPrinter(folder / "metrics.jsonl", log, out)
    try:
        with StopSignals() as signals, ProcessSandbox() as sandbox:
            environment = simulation_environment(sandbox.folder, os.environ)
            if address:
                environment |= ray_cluster.ray_environment(
                    address, folder, sandbox.mark, os.environ
                )
            flower = FlowerCLI(sandbox, signals, environment, CONNECTION)
            superlink = _start_superlink(flower, Path(environment["FLWR_HOME"]), logs)
            app = app_folder(sandbox.folder)
            run = flower.submit(app, overrides, "--federation-config", federation)
            if resumed:
                printer.begin_with(run)
            status = _follow(flower, superlink, run, folder, printer)
            printer.finish()
            outcome = evaluate_outcome(status, folder)
            if not outcome.succeeded:
                _keep_ray_logs(sandbox.folder, logs / "ray")
        return outcome
    finally:
        shutil.rmtree(folder / ray_cluster.HOME, ignore_errors=True)


def simulation_environment(scratch: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the simulation's processes: the user's, made safe and quiet."""
    local = ",".join(filter(None, [base.get("NO_PROXY") or base.get("no_proxy"), "127.0.0.1"]))
    user = {name: value for name, value in base.items() if name != ray_cluster.ADDRESS_VARIABLE}
    return {
        "RAY_DEDUP_LOGS": "0",
        **flower_environment(user, scratch / "flwr"),
        "NO_PROXY": local,
        "no_proxy": local,
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _start_superlink(flower: FlowerCLI, home: Path, logs: Path) -> "subprocess.Popen[bytes]":
    """Start a SuperLink, wait until it is healthy, and write it to Flower's config."""
    options = ["--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
    for _ in range(3):  # another process may take the port before the SuperLink does
        port = free_port()
        with (logs / "superlink.log").open("ab") as log:
            arguments = ("flower-superlink", *options, "--port", str(port))
            superlink = flower.spawn(*arguments, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while superlink.poll() is None and time.monotonic() < deadline:
            flower.pause()
            if listens(superlink.pid, port) and is_healthy(port):
                home.mkdir(exist_ok=True)
                (home / "config.toml").write_text(
                    f'[superlink]\ndefault = "{CONNECTION}"\n\n'
                    f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
                )
                return superlink
    raise RunError(f"Flower's SuperLink did not start; its log is {logs / 'superlink.log'}.")


def _follow(
    flower: FlowerCLI,
    superlink: "subprocess.Popen[bytes]",
    run: str,
    folder: Path,
    printer: ProgressPrinter,
) -> RunStatus:
    """Print the run's progress until it has finished or can no longer finish.

    A status query costs a second of CPU, so it is made only when the log has ended, a process has
    died, or `QUERY_SECONDS` have passed.
    """
    logs, result = folder / "logs", folder / "result.json"
    process: Process | None = None
    result_seen: float | None = None
    started = asked = time.monotonic()
    log: subprocess.Popen[bytes] | None = flower.stream_log(run, logs / "flower.log")
    while True:
        flower.pause()
        printer.show()
        now = time.monotonic()
        process = process or flower.sandbox.find("flwr-simulation")
        if result_seen is None and result.exists():
            result_seen = now
        problem, lost = "", False
        if superlink.poll() is not None:
            lost = True
            problem = (
                f"Flower's SuperLink ended with code {superlink.returncode} during the run; its "
                f"log is {logs / 'superlink.log'}."
            )
        elif process is not None and not is_alive(process):
            lost = True
            problem = (
                "The simulation's process ended without reporting to Flower: it was killed (out of "
                "memory?), crashed, or called os._exit."
            )
        elif process is None and now - started > START_SECONDS:
            problem = f"Flower did not start the simulation within {START_SECONDS:.0f} s."
        elif result_seen is not None and now - result_seen > FINISH_SECONDS:
            problem = f"Flower did not end the run within {FINISH_SECONDS:.0f} s of its result."
        log_ended = log is not None and log.poll() is not None
        if problem or log_ended or now - asked > QUERY_SECONDS:
            status = flower.status(run) if superlink.poll() is None else RunStatus("")
            asked = now
            if status.finished:
                return status
            if problem:
                return RunStatus(status.status, problem, lost)
            log = None if log_ended else log or flower.stream_log(run, logs / "flower.log")


def _keep_ray_logs(scratch: Path, target: Path) -> None:
    """Copy the logs of Ray's workers: if one dies, they may be the only trace of the cause."""
    for source in sorted(scratch.glob("ray/session_2*/logs/worker-*")):
        if source.is_file() and source.stat().st_size:
            target.mkdir(exist_ok=True)
            shutil.copyfile(source, target / source.name)
