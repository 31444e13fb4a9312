"""A prepared run carried out by the engine that it names, with its restarts.

To add an engine, give it a name in `pilot_flwr.config.schema`, and a function here that makes one
attempt.
"""

import shlex
from collections.abc import Callable

from pilot_flwr.config import overrides as submission
from pilot_flwr.launch import prepare as restarts
from pilot_flwr.launch import ray_cluster as cluster_nodes
from pilot_flwr.launch import simulation
from pilot_flwr.launch.prepare import Prepared
from pilot_flwr.run.atomic import hold
from pilot_flwr.run.outcome import Outcome

Out = Callable[[str], None]


def carry_out(prepared: Prepared, *, out: Out, verbose: bool = False) -> Outcome:
    """Run to the end what is prepared, and say how it ended.

    Parameters
    ----------
    prepared : Prepared
        Not `done`.
    out : callable
        Takes the lines of the live output.
    verbose : bool
        Show Flower's own log as well.

    Raises
    ------
    PilotError
        The run could not be started, or another process is at work in its folder.
    Interrupted
        A signal said stop; nothing is left running.
    """
    config, folder = prepared.config, prepared.folder
    app = None if prepared.in_process else submission.app_folder()
    doing = "going on in run folder" if prepared.resumed else "run folder"
    out(f"{config.name}: {config.num_clients} clients, {doing} {folder}")
    address, federation = prepared.address, prepared.federation
    if address:
        found, federation = cluster_nodes.prepare(config, address, folder)
        address = found.address
        out(found.describe(config.simulation))

    def attempt(overrides: str, resume_hint: bool) -> Outcome:
        if app is None:
            from pilot_flwr.launch.in_process import run_in_process

            return run_in_process(overrides, folder, out=out, verbose=verbose, resumed=resume_hint)
        return simulation.launch(
            app,
            overrides,
            federation,
            folder,
            out=out,
            verbose=verbose,
            address=address,
            resumed=resume_hint,
        )

    if app is not None:
        out("Starting Flower and Ray; the first news takes half a minute.")
    with hold(folder / restarts.LAUNCH_LOCK, f"The run folder {folder}"):
        if not prepared.resumed:
            restarts.keep_overrides(folder, prepared.overrides)
        return restarts.run_attempts(
            attempt,
            prepared.overrides,
            folder,
            restarts=config.run.restarts,
            resumed=prepared.resumed,
            out=out,
        )


def how_to_go_on(prepared: Prepared) -> str:
    """Return the command that resumes a run."""
    return f"pilot-flwr run resume={shlex.quote(str(prepared.folder))}"
