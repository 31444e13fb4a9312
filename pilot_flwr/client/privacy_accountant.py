"""A site's privacy budget: its requirements for a run, and the (ε, δ) account of its releases.

The server is not trusted to keep differential privacy on. A site's demands come from its node
config (`pilot_flwr.client.node`); a run that offers less is refused at the roster query and again
at every instruction.

Unit and relation: the whole data set of one client, replaced by any other one. Every release is a
Gaussian mechanism of multiplier z / 2 (`pilot_flwr.client.privacy`), chosen by a server that has
seen all earlier releases: adaptive composition, which Rényi differential privacy adds up (Mironov
2017, "Rényi differential privacy", proposition 1). ``dp-accounting`` computes the sums and their
conversion to (ε, δ). There is no sampling, hence no amplification. Every release is counted on the
client's disk before the session that makes it reads any data, also if the exchange is repeated or
the session fails.

That a session fails is one bit about the data which no noise covers. So that the budget bounds the
number of such bits, no session counts for less than a release of multiplier `MOST_COUNTED_NOISE`.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot_flwr.config.schema import MOST_NOISE, PrivacyConfig
from pilot_flwr.errors import ConfigError, StateError
from pilot_flwr.protocol import Spent
from pilot_flwr.run.atomic import hold, write_text

FORMAT = "pilot-flwr-privacy-1"
"""Version of the account's file."""

MOST_COUNTED_NOISE = 32.0
"""Largest z that an account counts: ε ≤ 1 at δ = 1e-5 allows at most 15 sessions."""

PATIENCE_SECONDS = 60.0
"""How long to wait for another process that counts a release, which takes milliseconds."""


@dataclass(frozen=True)
class PrivacyDemands:
    """A site's own limits; the defaults accept every run.

    They bound a run's `privacy.noise_multiplier` and `privacy.clip_norm`, and ε (at `delta`) of all
    releases over all runs. The guarantee does not cover losses and scores, so a private run gets
    them only with `allow_metrics`.
    """

    min_noise_multiplier: float = 0.0
    max_clip_norm: float = math.inf
    max_epsilon: float = math.inf
    delta: float = 1e-5
    allow_metrics: bool = False

    def __post_init__(self) -> None:
        # Noise has the size z C: with z close to 0 a run would be almost exact.
        bounds_noise = self.min_noise_multiplier > 0 or self.max_epsilon < math.inf
        if self.max_clip_norm < math.inf and not bounds_noise:
            raise ConfigError(
                f"`max-clip-norm` is {self.max_clip_norm:g} but bounds no ε without "
                "`min-noise-multiplier` or `max-epsilon`: a run could add almost no noise. Set "
                "one of them."
            )

    @property
    def any(self) -> bool:
        """Whether this site joins private runs only."""
        limits = (self.max_clip_norm, self.max_epsilon)
        return self.min_noise_multiplier > 0 or min(limits) < math.inf

    def check(self, privacy: PrivacyConfig) -> None:
        """Raise `ConfigError` if a run's settings offer less than this site demands."""
        if not self.any:
            return
        if not privacy.enabled:
            raise ConfigError(
                "`privacy.enabled` of the run is false but this site demands differential privacy "
                "(`min-noise-multiplier`, `max-clip-norm` or `max-epsilon` in its node config)."
            )
        if privacy.noise_multiplier < self.min_noise_multiplier:
            raise ConfigError(
                f"`privacy.noise_multiplier` of the run is {privacy.noise_multiplier:g} but this "
                f"site demands at least {self.min_noise_multiplier:g} (`min-noise-multiplier`)."
            )
        if privacy.clip_norm > self.max_clip_norm:
            raise ConfigError(
                f"`privacy.clip_norm` of the run is {privacy.clip_norm:g} but this site demands "
                f"at most {self.max_clip_norm:g} (`max-clip-norm`)."
            )
        if privacy.send_metrics and not self.allow_metrics:
            raise ConfigError(
                "`privacy.send_metrics` of the run is true but this site does not send losses and "
                "scores; `allow-metrics=true` in its node config would allow it."
            )

    def check_budget(self, epsilon_after: float) -> None:
        """Raise `ConfigError` if ε after one more release exceeds the budget."""
        if epsilon_after > self.max_epsilon:
            raise ConfigError(
                f"One more upload would bring this site to ε = {epsilon_after:.4g} at δ = "
                f"{self.delta:g}, over all its runs, but its `max-epsilon` is "
                f"{self.max_epsilon:g}: it takes no further part."
            )


def epsilon(noise_multipliers: Iterable[float], delta: float) -> float:
    """Return ε at `delta` of releases with these multipliers z; 0 if there are none."""
    accounting = require_accounting()
    accountant = accounting.rdp.RdpAccountant()
    for multiplier, count in Counter(noise_multipliers).items():
        # Noise is z C and the sensitivity 2 C.
        accountant.compose(accounting.GaussianDpEvent(multiplier / 2), count)
    return float(accountant.get_epsilon(delta))


def require_accounting() -> Any:
    """Return the module ``dp_accounting``; raise `ConfigError` if it is not installed."""
    try:
        import dp_accounting
    except ImportError:
        raise ConfigError(
            "`privacy.enabled` is true but dp-accounting is not installed here: "
            'pip install "pilot-flwr[privacy]".'
        ) from None
    return dp_accounting


class PrivacyAccount:
    """All releases of one client, over all its runs, in one file; deleting it loses the account."""

    def __init__(self, path: Path, client: str) -> None:
        self.path, self.client = path, client

    @classmethod
    def of(cls, state_folder: Path, client: str) -> "PrivacyAccount":
        """Return a client's account in its site's ``state-folder``, beside the folders of runs."""
        return cls(state_folder / f"{client}.privacy.json", client)

    def releases(self) -> list[dict[str, Any]]:
        """Return every release so far: ``run``, ``round``, ``noise_multiplier``, ``clip_norm``.

        Raises `StateError` if the file is corrupt or another client's; it is never replaced.
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
                f"{self.path} is not a privacy account: {type(error).__name__}: {error}. Without "
                "its account this client releases nothing."
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
    ) -> tuple[Spent, Spent]:
        """Count one release on disk, before any data is read; return the run's sum and the total.

        `check` raises if the site does not allow one more. It runs under the account's lock, which
        concurrent runs at one site share; nothing is counted if it raises.

        Raises `StateError` if the account cannot be read, `RunError` if another process holds its
        lock for `PATIENCE_SECONDS`.
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
        of_run = [release for release in releases if release["run"] == run]
        return _spent(of_run, config.delta), _spent(releases, config.delta)

    def spent(self, delta: float) -> Spent:
        """Return ε of all releases so far."""
        return _spent(self.releases(), delta)

    def epsilon_after(self, config: PrivacyConfig, delta: float) -> float:
        """Return ε of all releases and one more, without counting it."""
        one_more = {"noise_multiplier": config.noise_multiplier}
        return _spent([*self.releases(), one_more], delta).epsilon


def _spent(releases: list[dict[str, Any]], delta: float) -> Spent:
    multipliers = [min(release["noise_multiplier"], MOST_COUNTED_NOISE) for release in releases]
    return Spent(epsilon(multipliers, delta), delta, len(releases))


def _check_release(entry: Any) -> None:
    multiplier = entry["noise_multiplier"]
    usual = isinstance(multiplier, float | int) and not isinstance(multiplier, bool)
    if not usual or not 0 < multiplier <= MOST_NOISE or not isinstance(entry["run"], str):
        raise ValueError(
            f"the release {str(entry)[:200]} has no usable `noise_multiplier` or `run`"
        )
