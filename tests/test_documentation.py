"""The documentation agrees with the code: links, named tests and files, settings, commands."""

import ast
import importlib
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from pilot_flwr.config.schema import PilotConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
GENERATED = {"reference/settings.md", "reference/command-line.md"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FILE = re.compile(r"`((?:pilot_flwr|tests|benchmarks|scripts|conf|examples)/[\w/.-]+)`")
TITLE = re.compile(r"^#+ (.+)$", re.MULTILINE)


@pytest.fixture
def hooks(monkeypatch):
    """The MkDocs hook that generates the reference."""
    monkeypatch.syspath_prepend(DOCS)
    yield importlib.import_module("hooks")
    sys.modules.pop("hooks", None)


def anchor(title):
    """Return a title's anchor as GitHub and MkDocs make it."""
    text = re.sub(r"[^\w\- ]", "", title.strip().lower())
    return re.sub(r"[- ]+", "-", text)


def functions_of(path):
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def is_page(target):
    inside = target.is_relative_to(DOCS) and target.relative_to(DOCS).as_posix() in GENERATED
    return inside or target.exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_tests_and_files_exist(page):
    text = page.read_text()
    for link in LINK.findall(text):
        name, _, section = link.partition("#")
        if "://" in name:
            continue
        target = (page.parent / name).resolve() if name else page
        assert is_page(target), link
        if section and target.exists() and target.suffix == ".md":
            assert section in map(anchor, TITLE.findall(target.read_text())), link
    for path, name in TEST.findall(text):
        assert name in functions_of(path), (path, name)
    for path in FILE.findall(text):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(leaves(nav)) == pages | GENERATED


def leaves(entry):
    if isinstance(entry, str):
        return [entry]
    entries = entry.values() if isinstance(entry, dict) else entry
    return [leaf for inner in entries for leaf in leaves(inner)]


def test_the_readme_is_short_and_names_both_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert "\nmake demo " in text and "\nmake test " in text


def test_pages_that_the_code_names_exist():
    named = re.compile(r"docs/[\w/-]+\.md")
    for folder in ("pilot_flwr", "conf", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml"}:
                for page in named.findall(path.read_text()):
                    assert (ROOT / page).exists(), (path, page)


def test_the_settings_reference_has_every_setting_with_its_meaning(hooks):
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| [^|]+ \| (.*) \|$", hooks.settings_page(), re.M)
    found = [key for key, _ in rows]
    assert sorted(found) == sorted(keys_of(asdict(PilotConfig())))
    assert all(meaning for _, meaning in rows)


def keys_of(settings, prefix=""):
    """Yield the dotted keys of all settings; `data.files` has one of its own for each task."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_command_reference_has_every_command_and_the_pages_use_no_other(hooks):
    described = set(re.findall(r"^## `pilot-flwr ([\w ]+)`$", hooks.command_line_page(), re.M))
    assert {"run", "sweep", "table", "export", "data check", "data convert"} <= described
    for page in PAGES:
        used = re.findall(r"(?:^|`)pilot-flwr ((?:data )?[a-z]+)", page.read_text(), re.M)
        assert set(used) <= described, page


def test_the_events_reference_has_every_kind(hooks):
    kinds = re.findall(r"^\| `(\w+)` \|", hooks.events_table(), re.M)
    assert kinds[0] == "event" and "resume" in kinds and len(kinds) > 10


def test_the_method_page_names_functions_that_exist():
    text = (DOCS / "explanation" / "method.md").read_text()
    section = text.partition("From equation to code to test")[2]
    named = re.findall(r"`([a-z_]+)\.(\w+)", section.partition("All modules")[0])
    assert len(named) > 8
    for module, name in named:
        assert hasattr(importlib.import_module(f"pilot_flwr.algorithm.{module}"), name), name


def test_the_figure_is_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    figures = importlib.import_module("figures")
    for name, palette in figures.PALETTES.items():
        written = (DOCS / "assets" / f"method-{name}.svg").read_text(encoding="utf-8")
        assert written == figures.figure(palette)


def test_faults_are_documented_with_their_defaults_and_tests():
    text = (DOCS / "explanation" / "faults.md").read_text()
    named = re.findall(r"`(strategy|run)\.(\w+)` \((\d+)\)", text)
    named += re.findall(r"^\| `(strategy)\.(\w+)` \| (\d+) \|", text, re.MULTILINE)
    assert len(named) >= 6
    defaults = asdict(PilotConfig())
    for group, key, value in named:
        assert defaults[group][key] == float(value), key
    (table,) = re.findall(r"^\| what \| what happens \| test.*?\n\n", text, re.DOTALL | re.M)
    rows = table.strip().splitlines()[2:]
    assert len(rows) == 10 and all(TEST.search(row) for row in rows)
