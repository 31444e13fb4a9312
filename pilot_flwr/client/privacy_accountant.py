"""The (ε, δ) account of a client: every release, counted on its own disk before it leaves.

Unit and relation: the whole data set of one client, replaced by any other one. Every release is a
Gaussian mechanism of multiplier z / 2 (see `pilot_flwr.client.privacy`), chosen by a server that
has seen all releases before; that is adaptive composition, which Rényi differential privacy adds up
(Mironov 2017, "Rényi differential privacy", proposition 1). The sums and their conversion to
(ε, δ) are those of Google's ``dp-accounting``; nothing is sampled, so nothing is amplified.

The account is kept by the client for itself, over all runs that it has state of: a repeated
exchange counts again, and so does a release that was counted but never sent.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pilot_flwr.config.schema import MOST_NOISE, PrivacyConfig
from pilot_flwr.errors import ConfigError, StateError
from pilot_flwr.protocol import Spent
from pilot_flwr.run.atomic import hold, write_text

FORMAT = "pilot-flwr-privacy-1"
"""Version of the account's file."""

PATIENCE_SECONDS = 60.0
"""How long to wait for another process that counts a release: that takes milliseconds."""


def epsilon(noise_multipliers: Iterable[float], delta: float) -> float:
    """Return ε of releases with these multipliers z, for `delta`; 0 if there are none.

    Raises
    ------
    ConfigError
        ``dp-accounting`` is not installed.
    """
    accounting = require_accounting()
    accountant = accounting.rdp.RdpAccountant()
    for multiplier, count in Counter(noise_multipliers).items():
        # Noise is z C and the sensitivity 2 C.
        accountant.compose(accounting.GaussianDpEvent(multiplier / 2), count)
    return float(accountant.get_epsilon(delta))


def require_accounting() -> Any:
    """Return the module ``dp_accounting``.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    try:
        import dp_accounting
    except ImportError:
        raise ConfigError(
            "`privacy.enabled` is true but the package that keeps the account is not installed "
            'here: pip install "pilot-flwr[privacy]", or dp-accounting.'
        ) from None
    return dp_accounting


class PrivacyAccount:
    """All releases of one client, in a file of its own.

    Parameters
    ----------
    path : Path
        Made at the first release. Whoever removes it forgets what was spent.
    client : str
        Whose it is; another client's file is refused.
    """

    def __init__(self, path: Path, client: str) -> None:
        self.path, self.client = path, client

    def releases(self) -> list[dict[str, Any]]:
        """Return every release so far: ``run``, ``round``, ``noise_multiplier``, ``clip_norm``.

        Raises
        ------
        StateError
            The file is torn, foreign or another client's. It is never begun anew by itself.
        """
        if not self.path.exists():
            return []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            version, client, releases = (content[k] for k in ("format", "client", "releases"))
            for entry in releases:
                _check_release(entry)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StateError(
                f"{self.path} is no privacy account: {type(error).__name__}: {error}. Without it "
                "this client cannot say what it has spent, so it releases nothing."
            ) from None
        if (version, client) != (FORMAT, self.client):
            raise StateError(
                f"{self.path} has format {version!r} and client {client!r} but must have "
                f"{FORMAT!r} and {self.client!r}."
            )
        return list(releases)

    def spend(
        self,
        config: PrivacyConfig,
        *,
        run: str,
        server_round: int,
        check: Callable[[], None] = lambda: None,
    ) -> Spent:
        """Count one release and flush it to disk; call this before anything is sent.

        Two runs at one site keep one account: whatever they do at once, each release is counted.

        Parameters
        ----------
        config : PrivacyConfig
            Noise and clipping of the release.
        run, server_round : str, int
            What it is for.
        check : callable
            Raises if the site does not allow one more release; nothing is counted then, and
            nobody else counts between this check and the release.

        Raises
        ------
        StateError
            The account cannot be read.
        RunError
            Another process has held the account for `PATIENCE_SECONDS`.
        ConfigError
            ``dp-accounting`` is not installed.
        """
        require_accounting()
        release = {
            "run": run,
            "round": server_round,
            "noise_multiplier": config.noise_multiplier,
            "clip_norm": config.clip_norm,
        }
        lock = self.path.with_name(f".{self.path.name}.lock")
        with hold(lock, f"The privacy account {self.path}", patience=PATIENCE_SECONDS):
            check()
            releases = [*self.releases(), release]
            content = {"format": FORMAT, "client": self.client, "releases": releases}
            write_text(self.path, json.dumps(content, indent=1) + "\n")
        return _spent(releases, run, config.delta)

    def epsilon_after(self, config: PrivacyConfig, delta: float) -> float:
        """Return ε of all releases and one more, over all runs; nothing is counted.

        Raises
        ------
        StateError
            The account cannot be read.
        ConfigError
            ``dp-accounting`` is not installed.
        """
        kept = [entry["noise_multiplier"] for entry in self.releases()]
        return epsilon([*kept, config.noise_multiplier], delta)


def _spent(releases: list[dict[str, Any]], run: str, delta: float) -> Spent:
    all_of_them = [entry["noise_multiplier"] for entry in releases]
    mine = [entry["noise_multiplier"] for entry in releases if entry["run"] == run]
    return Spent(
        epsilon=epsilon(mine, delta),
        total_epsilon=epsilon(all_of_them, delta),
        delta=delta,
        releases=len(mine),
        total_releases=len(all_of_them),
    )


def _check_release(entry: Any) -> None:
    multiplier = entry["noise_multiplier"]
    usual = isinstance(multiplier, float | int) and not isinstance(multiplier, bool)
    if not usual or not 0 < multiplier <= MOST_NOISE or not isinstance(entry["run"], str):
        raise ValueError(
            f"the release {str(entry)[:200]} has no usable `noise_multiplier` or `run`"
        )
