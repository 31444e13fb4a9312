"""What the documentation names is there: tests, other pages, their sections, defaults."""

import ast
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from pilot_flwr.config.schema import PilotConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FILE = re.compile(r"`((?:pilot_flwr|tests|benchmarks|scripts|conf)/[\w/.-]+)`")
TITLE = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchor(title):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def functions_of(path):
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_named_tests_lead_somewhere(page):
    text = page.read_text()
    for link in LINK.findall(text):
        name, _, section = link.partition("#")
        if "://" in name:
            continue
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if section:
            assert section in map(anchor, TITLE.findall(target.read_text())), link
    for path, name in TEST.findall(text):
        assert name in functions_of(path), (path, name)
    for path in FILE.findall(text):
        assert (ROOT / path).exists(), path


def test_every_page_can_be_found():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in LINK.findall(page.read_text())
    }
    assert set(PAGES) - linked <= {ROOT / "README.md"}


def test_what_is_done_about_faults_has_the_defaults_and_tests_that_there_are():
    text = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`(strategy|run)\.(\w+)` \((\d+)\)", text)
    named += re.findall(r"^\| `(strategy)\.(\w+)` \| (\d+) \|", text, re.MULTILINE)
    assert len(named) == 4
    defaults = asdict(PilotConfig())
    for group, key, value in named:
        assert defaults[group][key] == float(value), key
    (table,) = re.findall(r"^\| what \|.*?\n\n", text, re.DOTALL | re.MULTILINE)
    rows = table.strip().splitlines()[2:]
    assert len(rows) == 10 and all(TEST.search(row) for row in rows)
