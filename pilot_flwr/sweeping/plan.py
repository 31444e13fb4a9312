"""What a sweep's jobs are: one for every combination of the values that overrides list.

An override with several values (``seed=0,1,2``, ``strategy=glob(pilot*)``, ``strategy.rounds=
range(1,4)``) is swept over, as Hydra's basic sweeper does it: the last one changes fastest.
A list is one value: ``data.tasks=[vqa,counting]``; several are ``data.tasks=[a],[a,b]``.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from pilot_flwr.config import config_folder
from pilot_flwr.errors import ConfigError

LONGEST_NAME = 120
_PLAIN = re.compile(r"[A-Za-z0-9_.=,+\[\]-]+")
_LAUNCHER = ("hydra/launcher=", "hydra.launcher.")
_OWN = ("resume", "run.folder")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Of its folder: the overrides that tell it from the other jobs.
    words : tuple of str
        All of its overrides.
    swept : dict
        Those that are swept over: setting → value, as text.
    """

    name: str
    words: tuple[str, ...]
    swept: dict[str, str]


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the settings' overrides from those that choose Hydra's launcher.

    Raises
    ------
    ConfigError
        A word is for another part of Hydra, which a sweep sets itself, or names a folder.
    """
    launcher = [word for word in words if word.lstrip("+~").startswith("hydra")]
    for word in launcher:
        if not word.lstrip("+").startswith(_LAUNCHER):
            raise ConfigError(
                f"The override {word!r} is for Hydra, of which a sweep takes `hydra/launcher` and "
                "`hydra.launcher.…` alone."
            )
    settings = [word for word in words if word not in launcher]
    for word in settings:
        key = word.lstrip("+~").partition("=")[0]
        if key in _OWN:
            raise ConfigError(
                f"The override {word!r} is for one run; a sweep gives every job a folder of its "
                "own inside `--out FOLDER`, and goes on in a folder that is there already."
            )
    return settings, launcher


def plan_jobs(words: Sequence[str]) -> list[Job]:
    """Return a sweep's jobs, in the order in which Hydra's basic sweeper starts them.

    Parameters
    ----------
    words : sequence of str
        Overrides of settings, with one value or several.

    Raises
    ------
    ConfigError
        A word is no override, has no values, or two jobs would be the same.
    """
    choices: dict[str, list[str]] = {}
    swept: set[str] = set()
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for word in words:
            try:
                (override,) = parser.parse_overrides([word])
                key, values = override.get_key_element(), _values(override)
            except (HydraException, ValueError) as error:
                raise ConfigError(
                    f"The override {word!r} cannot be read: {str(error).splitlines()[0]}."
                ) from None
            choices[key] = values
            swept.discard(key)  # a later word for a setting takes the place of an earlier
            if override.is_sweep_override():
                swept.add(key)
    jobs = []
    for combination in itertools.product(*choices.values()):
        chosen = dict(zip(choices, combination, strict=True))
        differing = {key.lstrip("+"): chosen[key] for key in choices if key in swept}
        job_words = tuple(f"{key}={value}" for key, value in chosen.items())
        jobs.append(Job(job_name(differing), job_words, differing))
    _check_names(jobs)
    return jobs


def job_name(swept: dict[str, str]) -> str:
    """Return the name of a job's folder: its swept overrides, in plain characters.

    What a folder's name cannot hold, or a long name's end, is replaced by a hash of all.
    """
    text = ",".join(f"{key}={value}" for key, value in swept.items()) or "job"
    if _PLAIN.fullmatch(text) and len(text) <= LONGEST_NAME:
        return text
    tag = hashlib.sha256(text.encode()).hexdigest()[:8]
    plain = re.sub(r"[^A-Za-z0-9_.=,+\[\]-]+", "-", text)
    return f"{plain[: LONGEST_NAME - 9]}-{tag}"


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"The override {override.input_line!r} is a range without steps: list the values."
        )
    values = [str(value) for value in override.sweep_string_iterator()]
    if not values:
        raise ConfigError(f"The override {override.input_line!r} has no values.")
    return values


def _check_names(jobs: Sequence[Job]) -> None:
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two jobs of the sweep are the same: {name}.")
