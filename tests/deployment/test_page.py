"""The parts of the deployment guide that the federation's test does not execute."""

import re
import shlex
import shutil
import subprocess
import tomllib

import guide
import pytest
from guide import BIN, blocks

from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand

UNIT = re.compile(r"```ini\n# /etc/systemd/system/(\S+), (.*?)\n(.*?)```", re.DOTALL)
VALUES = {
    "$HOST": "pilot.example.org",
    "$PORT": "8443",
    "$LINK_PORT": "8000",
    "$NODE_PORT": "9094",
    "$SERVER": "/srv/pilot",
}


@pytest.fixture
def units():
    found = {name: text for name, _, text in UNIT.findall(guide.text())}
    names = ("superlink", "gateway", "site", "supernode")
    assert set(found) == {f"pilot-{name}.service" for name in names}
    return found


def command(text: str) -> list[str]:
    """Return the words of a unit's ``ExecStart``, its program without a folder."""
    (line,) = re.findall(r"^ExecStart=(.*)$", text.replace("\\\n", " "), re.MULTILINE)
    words = shlex.split(line)
    return [words[0].rsplit("/", 1)[-1], *words[1:]]


@pytest.mark.parametrize(
    "unit, block",
    [
        ("superlink", "server.superlink"),
        ("gateway", "server.gateway"),
        ("site", "site.serve"),
        ("supernode", "site.supernode"),
    ],
)
def test_a_unit_starts_what_its_step_starts(units, unit, block):
    """The step's last command, which the federation's test executes, with the page's values."""
    last = blocks()[block].replace("\\\n", " ").splitlines()[-1]
    for name, value in VALUES.items():
        last = re.sub(re.escape(name) + r"\b", value, last)
    assert command(units[f"pilot-{unit}.service"]) == shlex.split(last)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_understands_the_units(units, tmp_path):
    def findings(text: str) -> str:
        file = tmp_path / "pilot-try.service"
        file.write_text(text)
        verify = ["systemd-analyze", "verify", str(file)]
        done = subprocess.run(verify, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    for text in units.values():
        here = text.replace("/opt/pilot-flwr/bin", str(BIN)).replace("/usr/sbin/nginx", "/bin/true")
        assert findings(here) == ""
        assert "RestartSex" in findings(here.replace("RestartSec", "RestartSex"))


def test_flower_and_our_command_start_the_same_run(tmp_path):
    """The overrides of ``flwr run`` compose to what the federation's file does."""

    def written(block: str, name: str) -> str:
        text = blocks()[block].replace("$SERVER", str(tmp_path))
        (body,) = re.findall(rf"{name}\" <<END\n(.*?\n)END", text, re.DOTALL)
        return body

    overrides = tomllib.loads(written("server.flwr", "run.toml"))["overrides"]
    file = tmp_path / "federation.yaml"
    file.write_text(written("server.federation", "federation.yaml"))
    words = shlex.split(blocks()["server.run"].replace("\\\n", " "))
    words = words[words.index("pilot") + 1 :]
    words = [word.replace("$SERVER", str(tmp_path)) for word in words[1:-1]]
    words = [f"data={file}", *words, f"run.folder={tmp_path}/runs/second"]
    words = [word for word in expand(words) if not word.startswith("data.folder=")]  # no site's
    assert load_config(overrides) == load_config(shlex.join(words))
