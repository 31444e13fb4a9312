"""A run before it begins: overrides made whole, everything that can be known to be wrong refused.

`check_settings` looks at settings and data alone; `prepare` also settles the run folder and what
Flower's simulation engine is told. Nothing is started or written here.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pilot_flwr import submission
from pilot_flwr.config import PilotConfig, load_config
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.data.files import check_simulated
from pilot_flwr.errors import ConfigError
from pilot_flwr.federation_file import with_folder
from pilot_flwr.launching import cluster, restarts
from pilot_flwr.model.shipped import checkpoint_path
from pilot_flwr.storage.resume import check_resumable, completed

IN_PROCESS = "in-process"
"""`simulation.engine` of a run without Flower's and Ray's processes."""


@dataclass(frozen=True)
class Prepared:
    """A run that can start.

    Attributes
    ----------
    config : PilotConfig
        Its settings.
    overrides : str
        All of them, `run.folder` included, as Flower carries them.
    folder : Path
        Absolute run folder.
    resumed : bool
        Whether it goes on with what is in the folder.
    done : bool
        Whether there is nothing left to do.
    address : str
        Of the Ray cluster; empty for a Ray of its own, or none.
    federation : str
        ``flwr run --federation-config``; empty on a cluster, which has to be looked at for it.
    """

    config: PilotConfig
    overrides: str
    folder: Path
    resumed: bool
    done: bool
    address: str
    federation: str

    @property
    def in_process(self) -> bool:
        """Whether it runs in this process."""
        return self.config.simulation.engine == IN_PROCESS


def check_settings(words: Sequence[str]) -> tuple[PilotConfig, list[str]]:
    """Compose a simulation's settings and try what needs no more than files of data.

    Parameters
    ----------
    words : sequence of str
        Overrides.

    Returns
    -------
    PilotConfig, list of str
        The settings; and the overrides, with paths of data made absolute.

    Raises
    ------
    ConfigError
        They are wrong, or cannot be simulated on this machine.
    """
    config = load_config(shlex.join(words))
    if config.strategy.clients:
        raise ConfigError(
            f"`strategy.clients` is {config.strategy.clients}, a number of real sites, but a "
            "simulation has the configured clients: leave it 0, or use `--superlink`."
        )
    federation_clients(config.data)  # refuses an unknown task now, not a minute into the run
    config, whole = with_folder(config, list(words))
    if config.data.source == "llava":
        evaluated = config.evaluation.enabled
        check_simulated(config.data, ["train", "test"] if evaluated else ["train"])
    base = config.model.path
    if checkpoint_path(base) == base and os.path.isdir(base):  # the app runs in another folder
        whole.append(submission.path_override("model.path", Path(os.path.abspath(base))))
    return config, whole


def prepare(words: Sequence[str], environ: Mapping[str, str], now: datetime) -> Prepared:
    """Return a run as it is to be started.

    Parameters
    ----------
    words : sequence of str
        The user's overrides.
    environ : mapping
        May name a Ray cluster.
    now : datetime
        Names the run folder if nothing else does.

    Raises
    ------
    ConfigError
        Something is wrong that would stop the run.
    """
    resumed, given = restarts.words_of_run(words)
    config, whole = check_settings(given)
    address, federation = engine_options(config, environ)
    folder = resumed or submission.run_folder(config.run.folder, config.name, now)
    whole.append(submission.path_override("run.folder", folder))
    overrides = shlex.join(whole)
    composed = load_config(overrides)
    if composed.run.folder != str(folder):
        raise ConfigError(f"`run.folder` is {str(folder)!r} but Hydra cannot carry such a path.")
    if resumed:
        check_resumable(folder, composed)
    done = resumed is not None and completed(folder, config) is not None
    return Prepared(composed, overrides, folder, resumed is not None, done, address, federation)


def engine_options(config: PilotConfig, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the Ray cluster's address and ``--federation-config``, as `Prepared` has them.

    Raises
    ------
    ConfigError
        The machine has not what `simulation` asks for.
    """
    if config.simulation.engine != IN_PROCESS:
        address = cluster.address_of(config.simulation, environ)
        if address:
            return address, ""
    submission.check_gpus(config.simulation)
    return "", submission.federation_config(config.num_clients, config.simulation)
