"""A run in this process: the same ServerApp and ClientApp, without Flower's and Ray's processes.

Flower's simulation engine takes about half a minute to start, which is most of a small run's
time. Here the server's loop calls the clients one after the other, through
`pilot_flwr.flower.grid`. What is left behind, and what counts as success, is as in
`pilot_flwr.launch.simulation`. The base model stays in the process for the next run, which often
has the same; never more than one does.
"""

import _thread
import logging
import secrets
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pilot_flwr.client_app import app
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import PilotConfig, SimulationConfig
from pilot_flwr.flower.grid import InProcessGrid, NodeConfig
from pilot_flwr.launch.processes import Stopped, stoppable
from pilot_flwr.model.feature_cache import forget_features
from pilot_flwr.run.outcome import COMPLETED, Outcome, RunStatus, evaluate_outcome
from pilot_flwr.run.progress import ProgressPrinter
from pilot_flwr.server_app import run

TICK_SECONDS = 0.3


def run_in_process(
    overrides: str,
    folder: Path,
    *,
    out: Callable[[str], None],
    verbose: bool = False,
    resumed: bool = False,
) -> Outcome:
    """Run the app to its end, in this process.

    Parameters
    ----------
    overrides : str
        As Flower would carry them, `run.folder` included.
    folder : Path
        Absolute run folder.
    out : callable
        Takes the lines of the live output, from a thread of its own.
    verbose : bool
        Show Flower's own log as well.
    resumed : bool
        The run folder holds a run that goes on: what it recorded before is not shown again.

    Returns
    -------
    Outcome
        Whether the run succeeded, and why not.

    Raises
    ------
    Interrupted
        A signal said stop. The run can be resumed.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    config, run_id = load_config(overrides), secrets.randbits(62)
    narrator = ProgressPrinter(
        folder / "metrics.jsonl", logs / "flower.log" if verbose else None, out
    )
    if resumed:
        narrator.begin_with(str(run_id))
    details = ""
    try:
        with stoppable(), _log_file(logs / "flower.log"), _narration(narrator):
            grid = InProcessGrid(
                app,
                node_configs=node_configs(config),
                overrides=overrides,
                run_id=run_id,
                threads=config.simulation.client_cpus,
            )
            try:
                run(grid, config, overrides, flower_run=str(run_id))
            except Exception as error:
                logging.getLogger("flwr").error("%s", traceback.format_exc())
                details = f"{type(error).__name__}: {error}"
    finally:
        forget_features()
    return evaluate_outcome(RunStatus(COMPLETED, details), folder)


def node_configs(config: PilotConfig) -> list[NodeConfig]:
    """Return what Flower's simulation engine would tell each node, and the CPU if it has no GPU."""
    clients = config.num_clients
    place: dict[str, str] = {"device": "cpu"} if _without_gpus(config.simulation) else {}
    return [{"partition-id": i, "num-partitions": clients, **place} for i in range(clients)]


def _without_gpus(simulation: SimulationConfig) -> bool:
    return simulation.gpus == 0 or simulation.client_gpus == 0


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Write Flower's log to a file instead of the terminal."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("flwr")
    handlers, propagate = logger.handlers[:], logger.propagate
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(levelname)-8s :    %(message)s"))
    logger.handlers, logger.propagate = [file], False
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        file.close()
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _narration(narrator: ProgressPrinter) -> Iterator[None]:
    """Show the run's progress from a thread while the block runs, and the rest at its end."""
    ended = threading.Event()
    failed: list[OSError] = []

    def narrate() -> None:
        try:
            while not ended.wait(TICK_SECONDS):
                narrator.show()
        except OSError as error:  # the reader of the output has gone: stop, as a signal does
            failed.append(error)
            _thread.interrupt_main(signal.SIGTERM)

    thread = threading.Thread(target=narrate, name="narration", daemon=True)
    thread.start()
    try:
        yield
    except Stopped:
        if failed:
            raise failed[0] from None
        raise
    finally:
        ended.set()
        thread.join()
        if not failed:
            narrator.finish()
