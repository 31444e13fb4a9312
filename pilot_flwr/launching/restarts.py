"""Go on with a run: by the user's word, or by itself when a process of the simulation has died.

Errors of the run itself, such as too few replies, are never tried again. What an attempt leaves,
its logs and its ``result.json``, is kept in ``logs/attempt-N/``.
"""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from pilot_flwr.checks import expanded
from pilot_flwr.config import load_config
from pilot_flwr.errors import ConfigError
from pilot_flwr.launching.outcome import Outcome
from pilot_flwr.storage.provenance import keep_provenance
from pilot_flwr.storage.resume import OVERRIDES
from pilot_flwr.storage.tensors import write_text
from pilot_flwr.submission import path_override

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
