"""The ServerApp: load the configuration, open the run folder, run the strategy, close."""

import logging
from datetime import datetime
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pilot_flwr.checks import expanded
from pilot_flwr.config import PilotConfig, load_config, to_yaml
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import RunError
from pilot_flwr.grid import PollingGrid
from pilot_flwr.initial import initial_state
from pilot_flwr.run_folder import RunFolder
from pilot_flwr.server_state import ServerState
from pilot_flwr.strategy import PilotStrategy
from pilot_flwr.submission import default_run_folder
from pilot_flwr.wire import RunInfo

app = ServerApp()
logger = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation."""
    config = load_config(str(context.run_config["overrides"]))
    folder = RunFolder(run_path(config))
    folder.write("config.yaml", to_yaml(config))
    logger.info("Run folder: %s", folder.path)
    try:
        federate(grid, config, folder, run_name=f"{config.name}-{context.run_id}")
    except BaseException as error:
        folder.finish(error=f"{type(error).__name__}: {error}")
        raise
    result = folder.finish(error=None)
    logger.info("%d failures; results in %s", len(result["failures"]), folder.path)


def federate(grid: Grid, config: PilotConfig, folder: RunFolder, *, run_name: str) -> PilotStrategy:
    """Run R + 1 exchanges over `grid` and return the strategy with its final state."""
    initial = initial_state(config.model, seed=config.seed)
    strategy = PilotStrategy(
        config.strategy,
        ServerState(tuple(config.data.tasks), initial),
        run=RunInfo(run_name, str(folder.path), folder.token),
        folder=folder,
        expected={client.id: client.task for client in federation_clients(config.data)},
        evaluate=config.evaluation.enabled,
    )
    strategy.start(
        grid=PollingGrid(grid),
        initial_arrays=strategy.global_arrays(),
        num_rounds=strategy.num_exchanges,
        timeout=config.strategy.round_timeout_seconds,
    )
    return strategy


def run_path(config: PilotConfig) -> Path:
    """Return the absolute run folder: the configured one, or the default where Flower runs.

    Raises
    ------
    RunError
        It already holds a run.
    """
    if config.run.folder:
        path = expanded("run.folder", config.run.folder).absolute()
    else:
        path = default_run_folder(config.name, datetime.now()).absolute()
    if (path / "metrics.jsonl").exists():
        raise RunError(f"`run.folder` is {path}, which already holds a run; choose another.")
    return path
