"""Check a run's settings and complete its overrides, without starting anything.

`prepare` handles simulations, on this machine or a Ray cluster; `prepare_submission` handles real
sites behind a SuperLink. Add checks of every run to `check_settings`.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pilot_flwr.config.loading import check_effect, load_config
from pilot_flwr.config.overrides import (
    check_gpus,
    federation_config,
    path_override,
    run_folder,
    with_folder,
)
from pilot_flwr.config.rules import check_simulation, expanded
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import simulated_paths
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.launch.flower_cli import check_installation
from pilot_flwr.launch.ray_cluster import address_of
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.server.resume import OVERRIDES, check_resumable, completed

IN_PROCESS = "in-process"
"""`simulation.engine` of a run without Flower's and Ray's processes."""


@dataclass(frozen=True)
class Prepared:
    """A simulation that is ready to start: its settings and the arguments for Flower.

    `overrides` is complete, `run.folder` included, and `folder` absolute. `done` is true if the run
    to resume is already complete. `address` names an existing Ray cluster, or is empty.
    `federation` is the value of ``flwr run --federation-config``; it is empty on a cluster, where
    it depends on the machines found at the start.
    """

    config: PilotConfig
    overrides: str
    folder: Path
    resumed: bool
    done: bool
    address: str
    federation: str

    @property
    def resume_command(self) -> str:
        """The command that resumes the run."""
        return f"pilot-flwr run resume={shlex.quote(str(self.folder))}"


def prepare(overrides: Sequence[str], environ: Mapping[str, str], now: datetime) -> Prepared:
    """Check a simulation and choose its run folder, by default named after `now`.

    Raises `PilotError` for every problem that can be detected before the start.
    """
    resumed, given = resolve_resume(overrides)
    config, whole = check_settings(given)
    address, federation = engine_options(config, environ)
    folder = resumed or run_folder(config.run.folder, config.name, now)
    whole.append(path_override("run.folder", folder))
    composed = load_config(shlex.join(whole))
    if composed.run.folder != str(folder):
        raise ConfigError(f"`run.folder` is {str(folder)!r} but Hydra cannot parse such a path.")
    if resumed:
        check_resumable(folder, composed)
    done = resumed is not None and completed(folder, config) is not None
    return Prepared(
        composed, shlex.join(whole), folder, resumed is not None, done, address, federation
    )


def prepare_submission(overrides: Sequence[str]) -> tuple[PilotConfig, str]:
    """Check a run of real sites; return its settings and the overrides to submit.

    `run.folder`, `resume` and `strategy.client_keys` are paths on the SuperLink's machine. On that
    machine itself, a resumed run starts from its recorded overrides, as in a simulation.
    """
    config = load_config(shlex.join(overrides))
    for key, value in (("run.folder", config.run.folder), ("resume", config.resume)):
        if value and not Path(value).expanduser().is_absolute():
            raise ConfigError(
                f"`{key}` is {value!r} but must be an absolute path on the SuperLink's machine."
            )
    if config.resume and (Path(config.resume).expanduser() / OVERRIDES).is_file():
        overrides = resolve_resume(overrides)[1]
    config, whole = check_settings(overrides, simulated=False)
    return config, shlex.join(whole)


def check_settings(
    overrides: Sequence[str], *, simulated: bool = True
) -> tuple[PilotConfig, list[str]]:
    """Compose the settings and check them against the data files.

    Returns the settings, and the overrides with absolute paths of data and base model, since the
    app runs in another folder. A simulation's data must be on this machine; real sites check
    theirs.
    """
    config = load_config(shlex.join(overrides))
    if not config.resume:
        check_effect(overrides, config)
    if simulated and config.strategy.clients:
        raise ConfigError(
            f"`strategy.clients` is {config.strategy.clients}, a number of real sites, but a "
            "simulation takes its clients from the configuration: leave it 0, or use `--superlink`."
        )
    if simulated:
        check_simulation(config.strategy)
    federation_clients(config.data)  # rejects an unknown task before the run starts
    config, whole = with_folder(config, list(overrides))
    if simulated and config.data.source == "llava":
        evaluated = config.evaluation.enabled
        simulated_paths(config.data, ["train", "test"] if evaluated else ["train"])
    base = config.model.path
    if checkpoint_path(base) == base and os.path.isdir(base):
        whole.append(path_override("model.path", Path(os.path.abspath(base))))
    return config, whole


def engine_options(config: PilotConfig, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return `Prepared.address` and `Prepared.federation`; reject unavailable resources."""
    if config.simulation.engine != IN_PROCESS:
        check_installation()
        address = address_of(config.simulation, environ)
        if address:
            return address, ""
    check_gpus(config.simulation)
    return "", federation_config(config.num_clients, config.simulation)


def resolve_resume(overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Merge the overrides with those recorded in the run to resume, if any.

    Returns the absolute folder that `resume` names, or None; and the overrides: the recorded ones,
    then the user's, with `resume` as an absolute path and without `run.folder`, which must agree.
    """
    given = {_key(override): override for override in overrides}
    places = [given[key] for key in ("resume", "run.folder") if key in given]
    config = load_config(shlex.join(places)) if "resume" in given else None
    if config is None or not config.resume:
        return None, list(overrides)
    folder = Path(os.path.abspath(expanded("resume", config.resume)))
    try:
        recorded = shlex.split((folder / OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"`resume` is {str(folder)!r}, which is not the folder of a run to resume: it "
            f"has no readable {OVERRIDES}."
        ) from None
    if "run.folder" in given:
        named = config.run.folder
        if Path(os.path.abspath(expanded("run.folder", named))) != folder:
            raise ConfigError(f"`run.folder` is {named!r} but the resumed run is in {folder}.")
    whole = [old for old in recorded if _key(old) not in given] + list(overrides)
    whole = [override for override in whole if _key(override) not in ("resume", "run.folder")]
    return folder, [*whole, path_override("resume", folder)]


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
