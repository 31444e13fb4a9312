"""Go on with a run: by the user's word, or by itself when a process of the simulation has died.

Errors of the run itself, such as too few replies, are never tried again. What an attempt leaves,
its logs and its ``result.json``, is kept in ``logs/attempt-N/``.

A run before it begins: overrides made whole, everything that can be known to be wrong refused.

`check_settings` looks at settings and data alone; `prepare` also settles the run folder and what
Flower's simulation engine is told. Nothing is started or written here.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pilot_flwr.config import overrides as submission
from pilot_flwr.config.federation_file import with_folder
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import path_override
from pilot_flwr.config.rules import expanded
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import check_simulated
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.launch import ray_cluster as cluster
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.run.atomic import write_text
from pilot_flwr.run.outcome import Outcome
from pilot_flwr.run.provenance import keep_provenance
from pilot_flwr.server.resume import OVERRIDES, check_resumable, completed

LAUNCH_LOCK = ".launch.lock"
"""File of a run folder, locked by the ``pilot-flwr run`` that is at work in it."""

Start = Callable[[str, bool], Outcome]
"""From overrides, and whether the run goes on, to how it ended."""


def words_of_run(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Fill in what a run that is to be resumed was started with.

    Parameters
    ----------
    words : sequence of str
        The user's overrides.

    Returns
    -------
    Path or None, list of str
        The absolute folder that `resume` names, None if there is none; and all overrides:
        the run's own, then the user's, with `resume` and `run.folder` as absolute paths.

    Raises
    ------
    ConfigError
        `resume` names no run, or `run.folder` another folder.
    """
    named = [word for word in words if _key(word) == "resume"]
    if not named:
        return None, list(words)
    config = load_config(shlex.join(named[-1:]))
    if not config.resume:
        return None, list(words)
    folder = Path(os.path.abspath(expanded("resume", config.resume)))
    try:
        recorded = shlex.split((folder / OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"`resume` is {str(folder)!r}, which holds no run to go on with: it has no readable "
            f"{OVERRIDES}."
        ) from None
    given = {_key(word) for word in words}
    own = [word for word in recorded if _key(word) not in given | {"resume", "run.folder"}]
    places = [word for word in words if _key(word) == "run.folder"]
    if places:
        place = load_config(shlex.join(places[-1:])).run.folder
        if Path(os.path.abspath(expanded("run.folder", place))) != folder:
            raise ConfigError(f"`run.folder` is {place!r} but the resumed run is in {folder}.")
    mine = [word for word in words if _key(word) not in ("resume", "run.folder")]
    return folder, [*own, *mine, path_override("resume", folder)]


def keep_overrides(folder: Path, overrides: str) -> None:
    """Write down how a new run was started, and by which code, before anything else happens."""
    write_text(folder / OVERRIDES, overrides + "\n")
    keep_provenance(folder)


def run_attempts(
    start: Start,
    overrides: str,
    folder: Path,
    *,
    restarts: int,
    resumed: bool,
    out: Callable[[str], None],
) -> Outcome:
    """Start a run, and again from its last checkpoint when a process of it has died.

    Parameters
    ----------
    start : callable
        Makes one attempt.
    overrides : str
        Of the first attempt.
    folder : Path
        The run folder.
    restarts : int
        Further attempts at most.
    resumed : bool
        Whether the first attempt goes on with what is in the folder.
    out : callable
        Takes the lines for the user.
    """
    for number in range(restarts + 1):
        put_away(folder)
        outcome = start(overrides, resumed)
        if outcome.succeeded or not outcome.restartable or number == restarts:
            return outcome
        out("\nA process of the simulation died:")
        for line in outcome.explanation[:2]:
            out(f"  {line}")
        out(f"Restart {number + 1} of at most {restarts} (`run.restarts`): the last checkpoint.")
        if not resumed:
            overrides = f"{overrides} {shlex.join([path_override('resume', folder)])}"
        resumed = True
    raise AssertionError("the last attempt returns")


def put_away(folder: Path) -> None:
    """Move the logs and the result of an attempt to a folder of their own."""
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


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


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
    resumed, given = words_of_run(words)
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
