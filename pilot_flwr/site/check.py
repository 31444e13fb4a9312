"""Check at a site, all at once, everything for which the roster would refuse it.

Each row runs the code of a roster query (`pilot_flwr.site.handlers`); ``pilot-flwr site check``
prints the rows. Hashes are only printed: the server compares them with its own. To add a row, add
a line to `check_site` and a remedy to `REMEDIES`.
"""

import contextlib
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement

from pilot_flwr.client.node import Site, check_device, find_site, generated_key, site_config
from pilot_flwr.client.node_config import NodeConfig, NodeSettings, read_node_config
from pilot_flwr.client.preflight import check_files, check_writable, readiness_checks
from pilot_flwr.client.privacy_accountant import PrivacyAccount, require_accounting
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import SiteFiles
from pilot_flwr.data.federation import declared_examples
from pilot_flwr.errors import ConfigError, PilotError
from pilot_flwr.flower.client_key import client_key, fingerprint, public_key
from pilot_flwr.flower.compatibility import NAMES, identity_of
from pilot_flwr.formatting import count
from pilot_flwr.model.architectures import read_config
from pilot_flwr.model.checkpoints import weights_sample
from pilot_flwr.site.door import find_service

Result = Literal["ok", "refused", "note"]

REMEDIES = {
    "node config": "Correct these entries; docs/reference/sites.md lists all keys.",
    "packages": "Reinstall the package, in the version that the other machines have.",
    "device": "`nvidia-smi -L` lists the GPUs; `CUDA_VISIBLE_DEVICES` may hide them.",
    "identity key": '`chmod 600` it, or generate one: `ssh-keygen -t ecdsa -b 384 -N "" -f FILE`.',
    "base model": "Set `model-path` to a complete copy of the server's base model.",
    "processor": "Copy the base model's files of tokenizer, processor and chat template.",
    "run": "Agree on these settings with the server's operator, or change the node config.",
    "data files": "Correct the paths, or let this user read them: `namei -l PATH` shows which "
    "folder denies access.",
    "state folder": "Create it for this user alone: `install -d -m 700 -o USER FOLDER`.",
    "overlap": "`pilot-flwr data check --node-config` names the first shared row.",
    "examples": "Correct `train-file`.",
    "disk space": "Delete the folders of old runs (`pilot-flwr site status` lists them), or set "
    "`state-folder` to another disk.",
    "privacy": 'Install dp-accounting (`pip install "pilot-flwr[privacy]"`), restore the account '
    "from a backup, or raise `max-epsilon`.",
    "private states": "Restore the file from a backup, or move it away.",
    "service": "Restart `pilot-flwr site serve` as the SuperNode's user, with its node config.",
}
"""Remedy for each refusal, in addition to its text."""


@dataclass(frozen=True)
class Row:
    """Name, result and text of one check; the text is for the site's owner and may name paths."""

    check: str
    result: Result
    text: str

    @property
    def remedy(self) -> str:
        """The remedy if the check refused the site, otherwise empty."""
        return REMEDIES[self.check] if self.result == "refused" else ""


@dataclass
class _Rows:
    """Collects rows; an expected error inside `check` becomes a refusal."""

    found: list[Row] = field(default_factory=list)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Callable[[str], None]]:
        """Run a check; the yielded function takes the text of the row if it passes."""
        passed: list[str] = []
        try:
            yield passed.append
        except (PilotError, OSError) as error:
            self.found.append(Row(name, "refused", str(error)))
        else:
            self.found.append(Row(name, "ok", " ".join(passed)))

    def note(self, name: str, text: str) -> None:
        """Add a row that does not refuse the site."""
        self.found.append(Row(name, "note", text))


def check_site(values: NodeConfig, config: PilotConfig | None) -> list[Row]:
    """Check a site, for a run if its `config` is given; return a row per check.

    Like a query, this creates the state folder if possible, and leaves nothing in it except the
    cached overlap.
    """
    rows = _Rows()
    node, problems = _parse(values)
    with rows.check("node config") as passed:
        if problems:
            raise ConfigError(" ".join(problems))
        passed(count(len(values), "setting"))
    with rows.check("packages") as passed:
        passed(_check_packages())
    with rows.check("device") as passed:
        check_device(node.device)
        passed(node.device)
    if rows.found[-1].result == "refused":
        node = replace(node, device="auto")  # already reported; check the rest nevertheless
    _check_key(rows, node)
    if config is None:
        _check_alone(rows, node)
        rows.note("run", "not checked: add the run's overrides to check what depends on them")
    else:
        _check_for_run(rows, node, config)
    with rows.check("service") as passed, find_service(_readable(values, node)) as service:
        passed("accepts this code and node config" if service else "none: the site is cold")
    return rows.found


def _parse(values: NodeConfig) -> tuple[NodeSettings, list[str]]:
    """Parse a node config without its invalid entries; return it with all their errors."""
    problems: list[str] = []
    while True:
        try:
            return read_node_config(values), problems
        except ConfigError as error:
            wrong = [key for key in values if str(error).startswith(f"`{key}`")]
            if not wrong:
                raise
            problems.append(str(error))
            values = {key: value for key, value in values.items() if key not in wrong}


def _readable(values: NodeConfig, node: NodeSettings) -> NodeConfig:
    """Return the node config for the service, or only its state folder if it is invalid."""
    with contextlib.suppress(ConfigError):
        read_node_config(values)
        return values
    return {} if node.state_folder is None else {"state-folder": str(node.state_folder)}


def _check_packages() -> str:
    """Raise `ConfigError` unless the installed packages have the versions that this one pins."""
    wrong, fitting = [], 0
    for requirement in map(Requirement, requires("pilot-flwr") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed but must be {requirement.specifier}")
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            fitting += 1
        else:
            wrong.append(f"{requirement.name} is {installed} but must be {requirement.specifier}")
    if wrong:
        raise ConfigError("; ".join(wrong) + ".")
    return f"{fitting} packages as pinned, flwr {version('flwr')}, torch {version('torch')}"


def _check_key(rows: _Rows, node: NodeSettings) -> None:
    path = node.identity_key
    if path is None and node.state_folder is not None:
        path = generated_key(node.state_folder, node.client_id)
        if not path.exists():
            rows.note("identity key", "generated in the state folder at the first query")
            return
    if path is not None:
        with rows.check("identity key") as passed:
            passed(fingerprint(public_key(client_key(path, create=False))))


def _check_alone(rows: _Rows, node: NodeSettings) -> None:
    """Check everything that does not depend on a run."""
    if node.model_path is not None:
        with rows.check("base model") as passed:
            if not node.model_path.is_dir():
                raise ConfigError(
                    f"`model-path` names {str(node.model_path)!r}, which is not a folder."
                )
            model = ModelConfig(path=str(node.model_path))
            _check_processor(rows, model)
            read_config(model)
            sample = weights_sample(model)
            passed(_hashes({"base.projector": sample.projector, "base.weights": sample.whole}))
    with rows.check("data files"):
        files = SiteFiles(node.train_files, node.test_files, node.image_folder, node.linked_folders)
        check_files(files, evaluated=False)
    if node.state_folder is None:
        rows.found.append(
            Row("state folder", "refused", "`state-folder` is missing in the node config.")
        )
        return
    with rows.check("state folder") as passed:
        check_writable(node.state_folder)
        passed(_mode(node))
    account = PrivacyAccount.of(node.state_folder, node.client_id)
    if account.path.exists():
        with rows.check("privacy") as passed:
            require_accounting()
            spent = account.spent(node.demands.delta)
            passed(f"ε = {spent.epsilon:.4g} of {node.demands.max_epsilon:g} spent")


def _check_for_run(rows: _Rows, node: NodeSettings, config: PilotConfig) -> None:
    """Check everything that a roster query of the run checks."""
    site = None
    with rows.check("run") as passed:
        site = find_site(node, config, run_name="site-check", run_folder="", simulated=False)
        config = site_config(node, config, simulated=False)
        passed(f"client {site.client.id}, task {site.client.task}")
    if site is None:
        return
    _check_processor(rows, config.model)
    with rows.check("base model") as passed:
        read_config(config.model)  # names a damaged file
        passed(_hashes(identity_of(config)))
    try:
        for name, check in readiness_checks(site, config).items():
            with rows.check(name) as passed:
                check()
                if name == "state folder":
                    passed(_mode(node))
    finally:
        with contextlib.suppress(OSError):
            site.state_folder.rmdir()
    with rows.check("private states") as passed:
        passed(_check_states(site))
    with rows.check("examples") as passed:
        passed(str(declared_examples(config, site.client, files=site.files)))
    if config.privacy.enabled:
        _check_budget(rows, site, config)


def _check_states(site: Site) -> str:
    """Raise `StateError` if a run's newest private state is damaged or of another client."""
    runs = sorted(path for path in site.state_folder.parent.glob("*") if path.is_dir())
    stores = [replace(site, state_folder=run).private_store for run in runs]
    held = [store for store in stores if store.rounds()]
    for store in held:
        store.stage()
    return f"{count(len(held), 'run')}"


def _check_budget(rows: _Rows, site: Site, config: PilotConfig) -> None:
    with rows.check("privacy") as passed:
        site.check_budget(config.privacy)
        after = site.account.epsilon_after(config.privacy, site.demands.delta)
        limit = site.demands.max_epsilon
        passed(f"ε = {after:.4g} of {limit:g} after one more upload (δ = {site.demands.delta:g})")


def _check_processor(rows: _Rows, model: ModelConfig) -> None:
    from pilot_flwr.model.loading import load_processor  # imports transformers

    with rows.check("processor") as passed:
        load_processor(model.path, model.revision)
        passed("its chat template renders an image and a question")


def _hashes(identity: dict[str, str]) -> str:
    return "; ".join(f"{NAMES[k]}: {v or 'not on this machine'}" for k, v in identity.items())


def _mode(node: NodeSettings) -> str:
    assert node.state_folder is not None
    mode = stat.S_IMODE(node.state_folder.stat().st_mode)
    if mode & 0o077:
        return f"writable; its mode is {mode:o}: no other user needs access (chmod 700)"
    return "writable, for this user alone"
