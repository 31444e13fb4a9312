"""What is handed to Flower: the app's folder, the run folder, the configuration as text.

Three syntaxes are nested: Hydra's overrides, the shell's words (the app splits the overrides with
`shlex`) and TOML as Flower's command line reads it. Each function here writes one of them.
"""

import json
import os
import re
import tomllib
from datetime import datetime
from pathlib import Path

from pilot_flwr.config.rules import expanded
from pilot_flwr.config.schema import SimulationConfig
from pilot_flwr.errors import ConfigError, RunError


def app_folder() -> Path:
    """Return the folder of the Flower app: the checkout that this package is in.

    Raises
    ------
    RunError
        The package was installed without its checkout, so that there is no app to submit.
    """
    folder = Path(__file__).resolve().parents[2]
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        project["tool"]["flwr"]["app"]["components"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"There is no Flower app in {folder}. `pilot-flwr run` submits the project's checkout: "
            "clone the repository and install it with `pip install -e .`."
        ) from None
    return folder


def default_run_folder(name: str, now: datetime) -> Path:
    """Return the run folder of a run that names none: ``outputs/<name>-<YYYYmmdd-HHMMSS>``.

    It is relative: it starts where the user, or the ServerApp, stands.
    """
    return Path("outputs") / f"{name}-{now:%Y%m%d-%H%M%S}"


def run_folder(configured: str, name: str, now: datetime) -> Path:
    """Return the absolute run folder, which is new or empty.

    Parameters
    ----------
    configured : str
        `run.folder`; empty means `default_run_folder`. Relative paths start where the user
        stands.
    name : str
        The run's `name`.
    now : datetime
        Time for the default.

    Raises
    ------
    ConfigError
        There is something in it already.
    """
    path = expanded("run.folder", configured) if configured else default_run_folder(name, now)
    folder = Path(os.path.abspath(path))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`run.folder` is {str(folder)!r} but must be a new or empty folder.")
    return folder


def path_override(key: str, path: Path) -> str:
    """Return the Hydra override that sets `key` to a path, whatever characters it has."""
    plain = re.fullmatch(r"[A-Za-z0-9_./-]+", str(path))
    return f"{key}={path if plain else hydra_text(str(path))}"


def hydra_text(text: str) -> str:
    r"""Return `text` in Hydra's quotes.

    In them a quote is written ``\'`` and backslashes count only before a quote; OmegaConf reads
    ``\${`` as a plain ``${``.
    """
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\+)('|$)", r"\1\1\2", text).replace("'", r"\'")
    return f"'{text}'"


def toml_string(text: str) -> str:
    r"""Return `text` as a TOML string that Flower's command line takes as one value.

    Flower cuts ``key="value"`` pairs apart with a regular expression in which a value ends at
    the next double quote, escaped or not. So a double quote is written ``\u0022``.
    """
    pieces = (json.dumps(piece, ensure_ascii=False)[1:-1] for piece in text.split('"'))
    return '"' + r"\u0022".join(pieces).replace("\x7f", r"\u007f") + '"'


def federation_config(num_clients: int, simulation: SimulationConfig) -> str:
    """Return the value of ``flwr run --federation-config``.

    Parameters
    ----------
    num_clients : int
        SuperNodes to simulate.
    simulation : SimulationConfig
        Resources. `cpus` = 0 stands for all that this process may use, `gpus` = -1 for all that
        torch sees here, `client_gpus` = -1 for one per client if there is any.

    Raises
    ------
    ConfigError
        Not even one client fits: Flower would call that run completed.
    """
    cpus = simulation.cpus or len(os.sched_getaffinity(0))
    gpus = _visible_gpus() if simulation.gpus == -1 else simulation.gpus
    client_gpus = min(gpus, 1) if simulation.client_gpus == -1 else simulation.client_gpus
    if simulation.client_cpus > cpus:
        raise ConfigError(
            f"`simulation.client_cpus` is {simulation.client_cpus} but must be at most "
            f"`simulation.cpus`, here {cpus}."
        )
    if client_gpus > gpus:
        raise ConfigError(
            f"`simulation.client_gpus` is {client_gpus:g} but must be at most "
            f"`simulation.gpus`, here {gpus}."
        )
    values = {
        "num-supernodes": num_clients,
        "client-resources-num-cpus": simulation.client_cpus,
        "client-resources-num-gpus": float(client_gpus),
        "init-args-num-cpus": cpus,
        "init-args-num-gpus": gpus,
    }
    return " ".join(f"{key}={value!r}" for key, value in values.items())


def check_gpus(simulation: SimulationConfig) -> None:
    """Refuse GPUs that this machine does not have; their clients would end up on the CPU.

    Not part of `federation_config`, which a client calls too: Ray may hide the GPUs from it.

    Raises
    ------
    ConfigError
        `simulation.gpus` is above what torch sees.
    """
    if simulation.gpus > 0 and simulation.gpus > (seen := _visible_gpus()):
        raise ConfigError(
            f"`simulation.gpus` is {simulation.gpus} but must be at most {seen}, the number of "
            "GPUs that torch sees here."
        )


def _visible_gpus() -> int:
    import torch  # here, as it takes seconds, and only a run needs to know

    return torch.cuda.device_count()
