"""Run the same federation with the code of an earlier commit, beside the present one's."""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _record import ROOT

from deployment.federation import site_moments, supernode_log
from deployment.watch import CORRECTION, LogTimes

_DRIVER = """
import json, sys
from pathlib import Path
from deployment.federation import run_federation
import guide

guide.BIN = sys.argv[2]
folder, sites, words, more, result = json.loads(sys.argv[1])
done = run_federation(Path(folder), sites, words, **more)
lives = {site: [seen.began for seen in done.watch.lives(site, "flwr-clientapp")] for site in sites}
Path(result).write_text(json.dumps([done.events, done.began, done.gateway, lives]))
"""


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Check a commit out into a folder of its own for as long as the block runs."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def run_earlier(
    tree: Path, folder: Path, site: str, task: str, words: str, **more: Any
) -> tuple[list[dict[str, Any]], float, bool, list[tuple[float, str]]]:
    """Run a federation of one site with a checkout's own code and benchmark.

    Returns the events, the run's start, whether there was a gateway, and the site's moments.
    """
    result = folder.with_suffix(".json")
    arguments = json.dumps([str(folder), {site: task}, words, more, str(result)])
    scripts = folder.with_suffix(".bin")
    write_script(scripts / "pilot-flwr", tree)
    places = [tree, tree / "benchmarks"]
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(programs),
        "PYTHONPATH": os.pathsep.join(map(str, places)),
    }
    with LogTimes(supernode_log(folder, site)) as log:
        subprocess.run(  # nosec B603  # no shell, a commit of this repository
            [sys.executable, "-c", _DRIVER, arguments, str(scripts)],
            cwd=tree,
            env=environment,
            check=True,
        )
    events, began, gateway, lives = json.loads(result.read_text())
    starts = [began_at + CORRECTION for began_at in lives[site]]
    return events, began, gateway, site_moments(log.lines, starts)


def write_script(path: Path, tree: Path) -> None:
    """Write the command of a checkout, whose entry point may not be the installed one."""
    scripts = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts[path.name].split(":")
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n")
    path.chmod(0o755)


def _git(*arguments: str) -> None:
    command = ["git", *arguments]
    subprocess.run(command, cwd=ROOT, check=True)  # nosec B603 B607  # no shell, the user's git
