"""Write what Flower is given: the configuration as text, the run folder, the simulation's size.

Three syntaxes are nested: Hydra's overrides, shell quoting (the app splits the overrides with
`shlex`) and TOML as Flower's command line reads it. Each function here writes one of them.
"""

import json
import os
import re
from datetime import datetime
from pathlib import Path

from pilot_flwr.config.rules import expanded
from pilot_flwr.config.schema import SimulationConfig
from pilot_flwr.errors import ConfigError


def default_run_folder(name: str, now: datetime) -> Path:
    """Return the run folder of a run that names none: ``outputs/<name>-<YYYYmmdd-HHMMSS>``.

    It is relative to the working directory of the command or the ServerApp.
    """
    return Path("outputs") / f"{name}-{now:%Y%m%d-%H%M%S}"


def run_folder(configured: str, name: str, now: datetime) -> Path:
    """Return the absolute run folder, which is new or empty.

    Parameters
    ----------
    configured : str
        `run.folder`; empty means `default_run_folder`. Relative to the working directory.
    name : str
        The run's `name`.
    now : datetime
        Names the default folder.

    Raises
    ------
    ConfigError
        It is not empty.
    """
    path = expanded("run.folder", configured) if configured else default_run_folder(name, now)
    folder = Path(os.path.abspath(path))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`run.folder` is {str(folder)!r} but must be a new or empty folder.")
    return folder


def path_override(key: str, path: Path) -> str:
    """Return the Hydra override that sets `key` to a path with any characters."""
    plain = re.fullmatch(r"[A-Za-z0-9_./-]+", str(path))
    return f"{key}={path if plain else hydra_text(str(path))}"


def hydra_text(text: str) -> str:
    r"""Return `text` in Hydra's quotes.

    There a quote is written ``\'`` and a backslash escapes only a quote or backslashes before one;
    OmegaConf reads ``\${`` as a plain ``${``.
    """
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\+)('|$)", r"\1\1\2", text).replace("'", r"\'")
    return f"'{text}'"


def toml_string(text: str) -> str:
    r"""Return `text` as a TOML string that Flower's command line reads as one value.

    Flower splits ``key="value"`` pairs with a regular expression in which a value ends at the next
    double quote, escaped or not. So a double quote is written ``\u0022``.
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
        Resources. `cpus` = 0 means all that this process may use, `gpus` = -1 all that torch sees
        here, `client_gpus` = -1 one per client if there is any.

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
    """Refuse more GPUs than this machine has; their clients would run on the CPU.

    Not part of `federation_config`, which a client also calls: Ray may hide the GPUs from it.

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
    import torch  # takes seconds, and only a run needs it

    return torch.cuda.device_count()
