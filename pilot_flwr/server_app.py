"""The ServerApp: load the configuration, open the run folder, run the strategy, close."""

from __future__ import annotations

import functools
import logging
import shlex
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pilot_flwr.config.loading import check_effect, load_config
from pilot_flwr.config.overrides import default_run_folder
from pilot_flwr.config.rules import check_lora_rank, check_simulation, expanded
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import RunError, WorkerDied
from pilot_flwr.protocol import RunInfo
from pilot_flwr.run.atomic import hold

if TYPE_CHECKING:
    from pilot_flwr.run.events import Event
    from pilot_flwr.server.resume import OpenRun
    from pilot_flwr.strategy import PilotStrategy

app = ServerApp()
logger = logging.getLogger("flwr")
SERVER_LOCK = ".server.lock"

PATIENCE_SECONDS = 60.0
"""How long to wait for the lock: the ServerApp of a killed run may exit late."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation."""
    overrides = str(context.run_config["overrides"])
    config = load_config(overrides)
    if not config.resume:
        check_effect(shlex.split(overrides), config)
    run(grid, config, overrides, flower_run=str(context.run_id))


def run(grid: Grid, config: PilotConfig, overrides: str, *, flower_run: str) -> None:
    """Start or resume a run under the lock of its folder, and write its result.

    `overrides` is the source of the configuration, `flower_run` is Flower's id of the run.
    """
    from pilot_flwr.run.loggers import live_logs
    from pilot_flwr.server import resume
    from pilot_flwr.server.event_recorder import Announcer

    path = _run_path(config)
    # Before the lock creates a file in a folder that the run cannot use.
    if config.resume:
        resume.check_resumable(path, config)
    else:
        resume.check_unused(path)
    announcer = Announcer(logger.info)
    with hold(path / SERVER_LOCK, f"The run folder {path}", patience=PATIENCE_SECONDS):
        if config.resume and (result := resume.completed(path, config)):
            logger.info("The run in %s is complete; there is nothing left to do.", path)
            announcer.end(path, result)
            return
        name = f"{config.name}-{flower_run}"
        if config.resume:
            opened = resume.resume_run(path, config, overrides, name=name, flower_run=flower_run)
        else:
            opened = resume.start_run(path, config, overrides, name=name)
        logger.info("Run folder: %s", path)
        try:
            with live_logs(
                config,
                opened.folder,
                name=opened.identity.name,
                after=opened.checkpoint.server_round if opened.checkpoint else None,
            ) as log:

                def listen(event: Event) -> None:
                    announcer.event(event)
                    log(event)

                opened.folder.listener = listen
                federate(grid, config, opened)
        except BaseException as error:
            restartable = isinstance(error, WorkerDied)
            text = f"{type(error).__name__}: {error}"
            announcer.end(path, opened.folder.finish(error=text, restartable=restartable))
            raise
        result = opened.folder.finish(error=None)
        logger.info("%d failures; results in %s", len(result["failures"]), path)
        announcer.end(path, result)


def federate(grid: Grid, config: PilotConfig, opened: OpenRun) -> PilotStrategy:
    """Run the remaining exchanges over `grid`; return the strategy with its final state."""
    from pilot_flwr.algorithm.parameter_groups import Sharing
    from pilot_flwr.algorithm.server_state import ServerState
    from pilot_flwr.flower.client_key import read_client_keys
    from pilot_flwr.flower.compatibility import identity_of
    from pilot_flwr.flower.grid import PollingGrid, clients_at_once, in_simulation
    from pilot_flwr.model.loading import initial_state
    from pilot_flwr.server.resume import restored
    from pilot_flwr.strategy import CLIENT_KEYS, PilotStrategy

    sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
    initial = initial_state(config.model, seed=config.seed).sent(sharing)
    tasks, folder, identity = tuple(config.data.tasks), opened.folder, opened.identity
    if opened.checkpoint:
        state = restored(opened.checkpoint, tasks, initial)
    else:
        state = ServerState(tasks, initial)
    simulated, operator_keys, recorded = in_simulation(grid), {}, folder.path / CLIENT_KEYS
    if simulated:
        check_simulation(config.strategy)
    if config.strategy.client_keys:
        operator_keys = read_client_keys(
            expanded("strategy.client_keys", config.strategy.client_keys)
        )
    strategy = PilotStrategy(
        config.strategy,
        state,
        run=RunInfo(identity.name, str(folder.path), folder.token),
        folder=folder,
        expected={client.id: client.task for client in federation_clients(config.data)},
        identity=identity_of(config),
        check_rank=functools.partial(check_lora_rank, "lora-rank", config=config),
        settings=identity.settings,
        simulated=simulated,
        evaluate=config.evaluation.enabled and not config.privacy.withholds_metrics,
        upload_bits=config.model.upload_bits,
        seed=config.seed,
        at_once=lambda: clients_at_once(grid, config.simulation),
        keys=read_client_keys(recorded) if recorded.is_file() else {},
        operator_keys=operator_keys,
    )
    strategy.start(
        grid=PollingGrid(grid),
        initial_arrays=strategy.global_arrays(),
        num_rounds=strategy.num_exchanges,
        timeout=config.strategy.round_timeout_seconds,
    )
    return strategy


def _run_path(config: PilotConfig) -> Path:
    """Return the absolute run folder; raise `RunError` if `run.folder` and `resume` differ."""
    if config.run.folder:
        folder = expanded("run.folder", config.run.folder).absolute()
    else:
        folder = default_run_folder(config.name, datetime.now()).absolute()
    if not config.resume:
        return folder
    path = expanded("resume", config.resume).absolute()
    if config.run.folder and folder != path:
        raise RunError(f"`run.folder` is {folder} but the resumed run is in {path}.")
    return path
