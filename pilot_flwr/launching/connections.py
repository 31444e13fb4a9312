"""The SuperLinks that the user's Flower knows: the connections of its ``config.toml``."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from pilot_flwr.errors import ConfigError


def find_connection(name: str, environment: Mapping[str, str]) -> str:
    """Return the address of a connection of Flower's ``config.toml``.

    Raises
    ------
    ConfigError
        The file has no such connection, or it is one of Flower's local simulations.
    """
    home = environment.get("FLWR_HOME")
    path = (Path(home) if home else Path.home() / ".flwr") / "config.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except FileNotFoundError:
        table = {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    found = {key: row for key, row in table.items() if isinstance(row, dict)}
    if name not in found:
        names = ", ".join(sorted(found)) or "none"
        raise ConfigError(
            f"`--superlink` is {name!r} but {path} has no [superlink.{name}]; it has: {names}."
        )
    address = str(found[name].get("address", ""))
    if not address or address.startswith(":"):
        raise ConfigError(
            f"`--superlink` is {name!r}, which in {path} is no SuperLink but a simulation here; "
            "for that leave `--superlink` out."
        )
    return address
