"""MkDocs hook: generate the reference of settings and commands from the code itself.

`on_files` adds ``reference/settings.md`` from the configuration's dataclasses and ``conf/``, and
``reference/command-line.md`` from the commands, so that neither can go out of date.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from pilot_flwr.config.schema import PilotConfig

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, page in (("settings", settings_page), ("command-line", command_line_page)):
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def settings_page() -> str:
    """Return the reference of all settings, by group."""
    parts = [
        "# Settings\n\nGenerated from the dataclasses in `pilot_flwr/config/`. A setting is given "
        "as an override, `KEY=VALUE`, on the command line or in Flower's `--run-config`; named "
        "choices (`strategy=fedit`) are [listed below](#named-choices). A wrong key, type or value "
        "stops with the key, the value and what is allowed. The defaults here are those of the "
        "dataclasses: `pilot-flwr run` without a choice takes `experiment=demo`, "
        "whose values `config.yaml` in the run folder shows.\n"
    ]
    for prefix, group in groups(PilotConfig):
        parts.append(section(prefix, group))
    return "\n".join([*parts, choices()])


def groups(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield each settings dataclass with the prefix of its keys, outermost first."""
    yield prefix, cls
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from groups(inner, f"{prefix}{field.name}.")


def section(prefix: str, cls: type) -> str:
    """Return the section of one dataclass: its description and a table of its settings."""
    hints, described = typing.get_type_hints(cls), field_docs(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        default = default_of(field)
        cells = [f"`{prefix}{field.name}`", type_name(hints[field.name]), default]
        rows.append([*cells, described.get(field.name, "")])
    header = ["setting", "type", "default", "meaning"]
    if not described:
        header, rows = header[:3], [row[:3] for row in rows]
    lines = [header, ["---"] * len(header), *rows]
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    text = description(cls)
    table = "\n".join("| " + " | ".join(escape(cell) for cell in row) + " |" for row in lines)
    return f"## {title}\n\n{text}\n" + (f"\n{table}\n" if rows else "")


def escape(cell: str) -> str:
    """Return a cell of a Markdown table."""
    return cell.replace("|", "\\|").replace("\n", " ")


def type_name(hint: Any) -> str:
    """Return a type as a reader would write it."""
    return hint.__name__ if hint in (int, float, str, bool) else str(hint).replace("typing.", "")


def default_of(field: "dataclasses.Field[Any]") -> str:
    """Return a field's default as it is typed in an override."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{','.join(map(str, value))}]`"
    if value == "":
        return "empty"
    return f"`{value}`"


def description(cls: type) -> str:
    """Return a class's docstring up to its first section, with Markdown's backticks."""
    text = inspect.cleandoc(cls.__doc__ or "")
    text = re.split(r"\n\n(?:Parameters|Attributes)\n-+\n", text)[0]
    return text.replace("``", "`")


def field_docs(cls: type) -> dict[str, str]:
    """Return what the ``Attributes`` section of a settings class says of each field."""
    text = inspect.cleandoc(cls.__doc__ or "")
    found = re.split(r"\n\n(?:Parameters|Attributes)\n-+\n", text)
    if len(found) < 2:
        return {}
    entries = re.findall(r"^(\S[^\n:]*?)(?: : [^\n]*)?\n((?:    .*\n?|\n)*)", found[1], re.M)
    return {
        name.strip(): " ".join(body.split()).replace("``", "`")
        for names, body in entries
        for name in names.split(",")
    }


def choices() -> str:
    """Return the named choices of ``conf/`` with the comment at the head of each file."""
    lines = [
        "## Named choices\n",
        "A file of `conf/`, chosen by `GROUP=NAME`. In order of precedence, later ones first: "
        "plain settings, `experiment`, then the other groups.\n",
    ]
    for group in ("experiment", "strategy", "model", "data", "train"):
        lines += [f"### `{group}=`\n", "| name | what it sets |", "|---|---|"]
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            lines.append(f"| `{path.stem}` | {escape(head_comment(path))} |")
        lines.append("")
    return "\n".join(lines)


def head_comment(path: Path) -> str:
    """Return the first sentence-like comment of a file, or its settings if it has none."""
    comments, settings = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package") or not line.strip():
            continue
        if line.startswith("#") and not settings:
            comments.append(line.lstrip("# "))
        elif not line.startswith("#"):
            settings.append(line.split(" #")[0].strip())
    if comments:
        return re.sub(r"\bdocs/(\S+?)\.md", r"[\1](../\1.md)", " ".join(comments))
    return "; ".join(f"`{line}`" for line in settings[:6])


def command_line_page() -> str:
    """Return the reference of the commands."""
    return "# Command line\n\n`pilot-flwr COMMAND --help` says the same in a terminal.\n"
