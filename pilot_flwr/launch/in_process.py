"""Run a simulation in this process: the same ServerApp and ClientApp, without Flower and Ray.

Flower's simulation engine takes about half a minute to start, which is most of a small run's time.
Here the server calls the clients sequentially, through `pilot_flwr.flower.grid`. Files and outcome
are those of `pilot_flwr.launch.simulation`. At most one base model stays cached in the process, for
the next run that uses it.
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

from pilot_flwr.client.parallel import end_ranks
from pilot_flwr.client_app import app
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.flower.grid import InProcessGrid, NodeConfig
from pilot_flwr.launch.processes import Interrupted, StopSignals
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
    """Make one attempt at a run in this process; arguments as for `simulation.launch`.

    `out` is called from another thread. A signal raises `Interrupted`; the run can be resumed.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    config, run_id = load_config(overrides), secrets.randbits(62)
    log = logs / "flower.log"
    printer = ProgressPrinter(folder / "metrics.jsonl", log if verbose else None, out)
    if resumed:
        printer.begin_with(str(run_id))
    details = ""
    try:
        with StopSignals(at_once=True), _log_file(log), _printing(printer):
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
        end_ranks()
    return evaluate_outcome(RunStatus(COMPLETED, details), folder)


def node_configs(config: PilotConfig) -> list[NodeConfig]:
    """Return the node configs of Flower's simulation engine, plus the device of a CPU-only run."""
    clients, simulation = config.num_clients, config.simulation
    on_cpu = simulation.gpus == 0 or simulation.client_gpus == 0
    device: dict[str, str] = {"device": "cpu"} if on_cpu else {}
    return [{"partition-id": i, "num-partitions": clients, **device} for i in range(clients)]


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
def _printing(printer: ProgressPrinter) -> Iterator[None]:
    """Print the run's progress from a thread during the block, and the rest on exit."""
    ended = threading.Event()
    failed: list[OSError] = []

    def follow() -> None:
        try:
            while not ended.wait(TICK_SECONDS):
                printer.show()
        except OSError as error:  # the reader of the output has exited: stop as on a signal
            failed.append(error)
            _thread.interrupt_main(signal.SIGTERM)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    except Interrupted:
        if failed:
            raise failed[0] from None
        raise
    finally:
        ended.set()
        thread.join()
        if not failed:
            printer.finish()
