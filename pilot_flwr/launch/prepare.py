"""Check a run before it starts, and complete its overrides; nothing is started here.

`prepare` does it for a simulation on this machine or a Ray cluster, `prepare_submission` for real
sites behind a SuperLink. To check more before every run, add it to `check_settings`.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pilot_flwr.config.federation_file import with_folder
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import check_gpus, federation_config, path_override, run_folder
from pilot_flwr.config.rules import expanded
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import check_simulated
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.launch.ray_cluster import address_of
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.server.resume import OVERRIDES, check_resumable, completed

IN_PROCESS = "in-process"
"""`simulation.engine` of a run without Flower's and Ray's processes."""


@dataclass(frozen=True)
class Prepared:
    """A simulation that can start: its settings, and how Flower is called.

    `overrides` is complete, `run.folder` included, and `folder` absolute. `done` says that the run
    to resume has nothing left to do. `address` names a Ray cluster; it is empty for a Ray of the
    run's own, or none. `federation` is the value of ``flwr run --federation-config``; it is empty
    on a cluster, whose machines have to be asked first.
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

    @property
    def resume_command(self) -> str:
        """The command that resumes the run."""
        return f"pilot-flwr run resume={shlex.quote(str(self.folder))}"


def prepare(overrides: Sequence[str], environ: Mapping[str, str], now: datetime) -> Prepared:
    """Check a simulation and settle its run folder, which `now` names if nothing else does.

    Raises `ConfigError` for everything that can be known to stop the run.
    """
    resumed, given = resolve_resume(overrides)
    config, whole = check_settings(given)
    address, federation = engine_options(config, environ)
    folder = resumed or run_folder(config.run.folder, config.name, now)
    whole.append(path_override("run.folder", folder))
    composed = load_config(shlex.join(whole))
    if composed.run.folder != str(folder):
        raise ConfigError(f"`run.folder` is {str(folder)!r} but Hydra cannot carry such a path.")
    if resumed:
        check_resumable(folder, composed)
    done = resumed is not None and completed(folder, config) is not None
    return Prepared(
        composed, shlex.join(whole), folder, resumed is not None, done, address, federation
    )


def prepare_submission(overrides: Sequence[str]) -> tuple[PilotConfig, str]:
    """Check a run of real sites; return its settings and the overrides to submit.

    `run.folder` and `resume` are paths on the SuperLink's machine. If this is that machine, a run
    is resumed with the overrides that it was started with, as in a simulation.
    """
    config = load_config(shlex.join(overrides))
    for key, value in (("run.folder", config.run.folder), ("resume", config.resume)):
        if value and not Path(value).expanduser().is_absolute():
            raise ConfigError(
                f"`{key}` is {value!r} but must be an absolute path, as it is on the SuperLink's "
                "machine."
            )
    if config.resume and (Path(config.resume).expanduser() / OVERRIDES).is_file():
        overrides = resolve_resume(overrides)[1]
    config, whole = check_settings(overrides, simulated=False)
    return config, shlex.join(whole)


def check_settings(
    overrides: Sequence[str], *, simulated: bool = True
) -> tuple[PilotConfig, list[str]]:
    """Compose the settings and check what needs no more than files of data.

    Returns the settings, and the overrides with the data's and the base model's paths absolute:
    the app runs in another folder. A simulation's clients need their data here; a real site checks
    its own.
    """
    config = load_config(shlex.join(overrides))
    if simulated and config.strategy.clients:
        raise ConfigError(
            f"`strategy.clients` is {config.strategy.clients}, a number of real sites, but a "
            "simulation has the configured clients: leave it 0, or use `--superlink`."
        )
    federation_clients(config.data)  # refuses an unknown task now, not a minute into the run
    config, whole = with_folder(config, list(overrides))
    if simulated and config.data.source == "llava":
        evaluated = config.evaluation.enabled
        check_simulated(config.data, ["train", "test"] if evaluated else ["train"])
    base = config.model.path
    if checkpoint_path(base) == base and os.path.isdir(base):
        whole.append(path_override("model.path", Path(os.path.abspath(base))))
    return config, whole


def engine_options(config: PilotConfig, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return `Prepared.address` and `Prepared.federation`; refuse resources that are not here."""
    if config.simulation.engine != IN_PROCESS:
        address = address_of(config.simulation, environ)
        if address:
            return address, ""
    check_gpus(config.simulation)
    return "", federation_config(config.num_clients, config.simulation)


def resolve_resume(overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Complete the overrides of a run to resume with those that it was started with.

    Returns the absolute folder that `resume` names, or None; and all overrides: the run's own, then
    the user's, with `resume` as an absolute path and without `run.folder`, which must be the same.
    """
    named = [override for override in overrides if _key(override) == "resume"]
    if not named:
        return None, list(overrides)
    config = load_config(shlex.join(named[-1:]))
    if not config.resume:
        return None, list(overrides)
    folder = Path(os.path.abspath(expanded("resume", config.resume)))
    try:
        recorded = shlex.split((folder / OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"`resume` is {str(folder)!r}, which holds no run to resume: it has no readable "
            f"{OVERRIDES}."
        ) from None
    given = {_key(override) for override in overrides}
    own = [word for word in recorded if _key(word) not in given | {"resume", "run.folder"}]
    places = [override for override in overrides if _key(override) == "run.folder"]
    if places:
        place = load_config(shlex.join(places[-1:])).run.folder
        if Path(os.path.abspath(expanded("run.folder", place))) != folder:
            raise ConfigError(f"`run.folder` is {place!r} but the resumed run is in {folder}.")
    new = [override for override in overrides if _key(override) not in ("resume", "run.folder")]
    return folder, [*own, *new, path_override("resume", folder)]


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
