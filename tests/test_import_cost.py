"""What an entry point may import, since every message of a deployment starts a process."""

import json
import os
import re
import subprocess
import sys

import pytest
from torch import nn

from pilot_flwr.config.rules import NAME_PATTERN
from pilot_flwr.data.federation import RESERVED

HEAVY = {
    "PIL",
    "datasets",
    "flwr",
    "hydra",
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "peft",
    "rapidfuzz",
    "ray",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch",
    "torch._dynamo",
    "torchvision",
    "transformers",
}
"""Packages that take more than a moment to import; `ALLOWED` says who may."""

APP = {"PIL", "flwr", "numpy", "rapidfuzz", "safetensors"}
QUERY = """
import math
from flwr.app import Message, MessageType
from pilot_flwr.client_app import app
from pilot_flwr.flower.grid import InProcessGrid
from pilot_flwr.flower.messages import encode_query
from pilot_flwr.protocol import RunInfo
nodes = [{"client-id": "vqa-0", "state-folder": FOLDER, "device": "cpu"}]
grid = InProcessGrid(app, node_configs=nodes, overrides="experiment=demo")
reply = grid.answer(Message(encode_query(RunInfo("run-1", "", ""), 1), 1, MessageType.QUERY))
assert not reply.has_error(), reply.error
assert reply.content["identity"]["base.weights"]
"""
PLAN = """
import contextlib, io
from pilot_flwr.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["plan", "experiment=paper"]) in (0, None)
"""
LIGHT = """
import pilot_flwr.config, pilot_flwr.protocol, pilot_flwr.run.events
import pilot_flwr.cli.main
"""
ALLOWED = {
    LIGHT: set(),
    "import pilot_flwr.client_app, pilot_flwr.server_app, pilot_flwr.data.federation": APP,
    QUERY: APP | {"hydra", "pandas", "scipy", "sklearn"},  # the demo's images are scikit-learn's
    PLAN: {"hydra", "numpy", "rapidfuzz", "safetensors", "torch"},
}
REMEMBERED = {QUERY, PLAN}
"""Those that compute shapes once and then remember them; the second run counts."""


@pytest.mark.parametrize("code", ALLOWED, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_an_entry_point_imports_only_what_it_needs(code, tmp_path):
    listed = "import json, sys\nprint(json.dumps(list(sys.modules)))"
    program = f"FOLDER = {str(tmp_path)!r}\n{code}\n{listed}"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(1 + (code in REMEMBERED)):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env
        )
        assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert imported & HEAVY <= ALLOWED[code]


def test_reserved_task_names_are_those_of_torch():
    names = {name for name in dir(nn.ModuleDict()) if NAME_PATTERN.fullmatch(name)}
    assert names <= RESERVED
    assert all(re.fullmatch(r"\w+", name) for name in RESERVED)
