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
NAMES = {"run.json", "run.events", "train.py"}  # no settings
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
        used = re.findall(r"(?:^|`)pilot-flwr ((?:data |site )?[a-z]+)", page.read_text(), re.M)
        assert set(used) <= described, page


def test_the_pages_use_settings_that_exist():
    """Whatever is written like a setting, alone in backticks or in an override."""
    keys = set(keys_of(asdict(PilotConfig())))
    sections = "model|data|train|strategy|evaluation|privacy|simulation|run"
    written = re.compile(rf"(?<![\w./-])((?:{sections})(?:\.[a-z][a-z0-9_]+)+)(?=[=`])")
    for page in PAGES:
        for key in written.findall(page.read_text()):
            known = key in keys or any(name.startswith(f"{key}.") for name in keys)
            files = key.startswith("data.files.") or key in NAMES
            assert known or files, (page, key)


def test_the_pages_use_options_that_exist(hooks):
    from pilot_flwr.cli.main import click_command

    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in hooks.commands(click_command())
    }
    used = re.compile(r"(?:^|`)(pilot-flwr (?:data |site )?[a-z]+)((?: [^\n`]*)?)", re.MULTILINE)
    seen = 0
    for page in PAGES:
        for name, rest in used.findall(page.read_text().replace("\\\n", " ")):
            for option in re.findall(r"(?<= )--?[a-z][\w-]*", rest.partition("#")[0]):
                seen += 1
                assert option in options[name], (page, name, option)
    assert seen > 40


def test_the_events_reference_has_every_kind(hooks):
    kinds = re.findall(r"^\| `(\w+)` \|", hooks.events_table(), re.M)
    assert kinds[0] == "event" and "resume" in kinds and len(kinds) > 10


def test_the_method_page_names_functions_that_exist():
    text = (DOCS / "explanation" / "method.md").read_text()
    section = text.partition("From equation to code to test")[2]
    named = re.findall(r"`([a-z_]+)\.(\w+)`", section.partition("All modules")[0])
    assert len(named) > 8
    for module, name in named:
        assert hasattr(importlib.import_module(f"pilot_flwr.algorithm.{module}"), name), name


def test_the_figure_is_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    figures = importlib.import_module("figures")
    for name, palette in figures.PALETTES.items():
        written = (DOCS / "assets" / f"method-{name}.svg").read_text(encoding="utf-8")
        assert written == figures.figure(palette)


def test_quoted_failures_are_what_the_code_says():
    table = (DOCS / "explanation" / "security.md").read_text().partition("## Attacks and faults")[2]
    quoted = re.findall(r'(?:failure|log): "([^"]+)"', table)
    sources = " ".join(path.read_text() for path in (ROOT / "pilot_flwr").rglob("*.py"))
    assert len(quoted) > 5
    for words in quoted:
        assert words in sources or words == "No space left on device", words


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
    assert len(rows) == 11 and all(TEST.search(row) for row in rows)
