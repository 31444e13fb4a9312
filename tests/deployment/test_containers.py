"""The container recipe does what the deployment guide does. No image is built here."""

import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.metadata import version

import pytest
import yaml
from guide import ROOT, blocks
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_page import VALUES

FOLDER = ROOT / "examples" / "containers"
STEPS = {
    "superlink": "server.superlink",
    "gateway": "server.gateway",
    "site": "site.serve",
    "supernode": "site.supernode",
}


def services(name="compose.yaml"):
    return yaml.safe_load((FOLDER / name).read_text())["services"]


def words(value):
    return shlex.split(value) if isinstance(value, str) else list(value or ())


def instructions():
    """Return the Dockerfile's instructions, each with its text."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in lines]


@pytest.mark.parametrize("service", STEPS)
def test_a_container_starts_what_its_step_starts(service):
    found = services()[service]
    last = blocks()[STEPS[service]].replace("\\\n", " ").splitlines()[-1]
    for name, value in VALUES.items():
        last = re.sub(re.escape(name) + r"\b", value, last)
    started = words(found.get("entrypoint")) + words(found["command"])
    default = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in started]
    assert default == shlex.split(last)


def test_the_keys_are_registered_as_in_the_guide():
    (script,) = services()["register"]["command"][2:]
    assert 'flwr supernode register "$$KEY" pilot --name' in script
    assert 'flwr supernode register "$KEY" pilot --name' in blocks()["server.register"]


@pytest.mark.parametrize("service", ["superlink", "register", "gateway", "site", "supernode"])
def test_no_container_has_more_rights_than_it_needs(service):
    found = services()[service]
    user, group = found["user"].split(":")
    assert int(user) > 0 and int(group) > 0 and found["read_only"]
    assert found["cap_drop"] == ["ALL"] and "no-new-privileges:true" in found["security_opt"]
    assert "privileged" not in found and "pid" not in found
    assert service == "register" or found["healthcheck"]["test"][0] == "CMD"
    assert not any("docker.sock" in volume for volume in found["volumes"])


def test_only_the_gateway_is_reached_from_outside():
    found = services()
    assert [name for name in found if "ports" in found[name]] == ["superlink"]  # its network's
    assert found["superlink"]["ports"] == [f"{VALUES['$PORT']}:{VALUES['$PORT']}"]
    assert found["gateway"]["network_mode"] == "service:superlink"
    assert found["site"]["network_mode"] == "none"


def test_service_and_supernode_are_one_user_with_one_state_folder():
    site, supernode = (services()[name] for name in ("site", "supernode"))
    for key in ("user", "volumes", "working_dir", "image"):
        assert site[key] == supernode[key]
    writable = [volume for volume in site["volumes"] if not volume.endswith(":ro")]
    assert writable == ["/srv/pilot-site:/srv/pilot-site"]
    gpu = services("compose.gpu.yaml")
    assert set(gpu) == {"site", "supernode"} and gpu["site"] == gpu["supernode"]


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose")
def test_compose_accepts_the_files():
    files = ["-f", "compose.yaml", "-f", "compose.gpu.yaml"]
    words = ["docker-compose", *files, "--profile", "server", "--profile", "site", "config", "-q"]
    done = subprocess.run(words, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_image_is_pinned_and_ends_as_an_ordinary_user():
    found = instructions()
    (argument,) = (text for name, text in found if name == "ARG")
    assert re.fullmatch(r"PYTHON=python:3\.11\.\d+-slim-\w+", argument)
    assert [text.split()[0] for name, text in found if name == "FROM"] == ["${PYTHON}"] * 2
    assert [text for name, text in found if name == "USER"] == [services()["site"]["user"]]
    assert found[-2][0] == "USER"
    assert not any("apt-get" in text for _, text in found)  # so no compiler
    images = {service["image"] for service in services().values()}
    assert all(re.search(r":\d+\.\d+\.\d+$", image) for image in images)
    assert f"pilot-flwr:{version('pilot-flwr')}" in images


def test_the_image_contains_what_it_copies_and_nothing_else():
    copied = [
        source
        for name, text in instructions()
        if name == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied)


def test_every_dependency_is_pinned_to_a_version_that_the_package_allows():
    lines = (FOLDER / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["privacy"]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
