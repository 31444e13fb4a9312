"""MkDocs hook: generate the reference of settings and commands from the code itself.

`on_files` adds ``reference/settings.md`` from the configuration's dataclasses and ``conf/``, and
``reference/command-line.md`` from the commands, so that neither can go out of date.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilot_flwr.config.loading import load_config
from pilot_flwr.config.rules import NEEDED, limits
from pilot_flwr.config.schema import PilotConfig

if typing.TYPE_CHECKING:  # the tests call the page functions without MkDocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, page in (("settings", settings_page), ("command-line", command_line_page)):
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def settings_page() -> str:
    """Return the reference of all settings, by group."""
    parts = [
        "# Settings\n\nGenerated from the dataclasses in `pilot_flwr/config/`. A setting is given "
        "as an override, `KEY=VALUE`, on the command line or in Flower's `--run-config`; named "
        "choices (`strategy=fedit`) are [listed below](#named-choices). A wrong key, type or value "
        "stops with the key, the value and what is allowed. Defaults are those of "
        "`pilot-flwr run` without overrides, which is `experiment=demo`; `config.yaml` in the run "
        "folder has the values of a run.\n"
    ]
    config = load_config("")
    for prefix, group in groups(PilotConfig):
        path = filter(None, prefix.split("."))
        inner = group() if "<" in prefix else functools.reduce(getattr, path, config)
        parts.append(section(prefix, group, inner))
    return "\n".join([*parts, choices()])


def groups(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield each settings dataclass with the prefix of its keys, outermost first."""
    yield prefix, cls
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        of_each = typing.get_args(inner)[1:] if typing.get_origin(inner) is dict else ()
        if dataclasses.is_dataclass(inner):
            yield from groups(inner, f"{prefix}{field.name}.")
        elif of_each and dataclasses.is_dataclass(of_each[0]):
            yield from groups(of_each[0], f"{prefix}{field.name}.<task>.")


def section(prefix: str, cls: type, defaults: Any) -> str:
    """Return the section of one dataclass: its description and a table of its settings."""
    hints, described, allowed = typing.get_type_hints(cls), field_docs(cls), limits(cls)
    rows = [["setting", "type", "default", "meaning"], ["---"] * 4]
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        meaning = described.get(field.name, "")
        if ranges := "; ".join(limit.allowed for limit in allowed[field.name]):
            meaning += f" Allowed: {ranges}."
        for switch, values in needs(f"{prefix}{field.name}"):
            meaning += f" Needs `{switch}`: {values}."
        default = shown(getattr(defaults, field.name))
        rows.append([f"`{prefix}{field.name}`", type_name(hints[field.name]), default, meaning])
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    table = "\n".join("| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows)
    text = f"## {title}\n\n{markdown(inspect.cleandoc(cls.__doc__ or ''))}\n"
    return text + (f"\n{table}\n" if rows[2:] else "")


def needs(setting: str) -> Iterator[tuple[str, str]]:
    """Yield each setting that this one depends on, and the values with which it has an effect."""
    for need in NEEDED:
        if f"{setting}.".startswith(f"{need.setting}.") and setting != need.switch:
            yield (
                need.switch,
                ", ".join(shown(value).strip("`") for value in need.allowed) or "above 0",
            )


def escape(cell: str) -> str:
    """Return a cell of a Markdown table."""
    return cell.replace("|", "\\|").replace("\n", " ")


def type_name(hint: Any) -> str:
    """Return a type as a reader would write it."""
    return hint.__name__ if hint in (int, float, str, bool) else re.sub(r"[\w.]+\.", "", str(hint))


def shown(value: Any) -> str:
    """Return a value as it is typed in an override."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{','.join(map(str, value))}]`"
    return "empty" if value == "" else f"`{value}`"


def markdown(text: str) -> str:
    """Return a docstring's text as Markdown, with links to pages that it names."""
    text = text.replace("``", "`")
    return re.sub(r"(?<![`\w])docs/([\w/-]+)\.md", r"[\1](../\1.md)", text)


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a settings class."""
    (body,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in itertools.pairwise(body.body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[node.target.id] = markdown(" ".join(text.split()))
    return found


def choices() -> str:
    """Return the named choices of ``conf/`` with the comment at the head of each file."""
    lines = [
        "## Named choices\n",
        "A file of `conf/`, chosen by `GROUP=NAME`. Plain settings take precedence over "
        "`experiment`, and that over the other groups.\n",
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
        if line.strip() == "#":
            break  # the first paragraph says enough
        if line.startswith("#") and not settings:
            comments.append(line.lstrip("# "))
        elif not line.startswith("#"):
            settings.append(line.split(" #")[0].strip())
    if comments:
        return markdown(" ".join(comments))
    return "; ".join(f"`{line}`" for line in settings[:6])


def command_line_page() -> str:
    """Return the reference of the commands, from the click commands themselves."""
    from pilot_flwr.cli.main import click_command

    parts = [
        "# Command line\n\nGenerated from the commands. `pilot-flwr COMMAND --help` shows the same "
        "in a terminal. Exit codes: [Run folder and events](run-folder.md#exit-codes).\n"
    ]
    parts += [command_section(name, command) for name, command in commands(click_command())]
    return "\n".join(parts)


def commands(group: Any, prefix: str = "pilot-flwr") -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, by its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def command_section(name: str, command: Any) -> str:
    """Return a command's usage, its help and a table of arguments and options."""
    arguments, rows = [], []
    for parameter in command.params:
        text = " ".join((parameter.help or "").split())
        if parameter.param_type_name == "argument":
            shape = parameter.metavar or parameter.name.upper()
            arguments.append(shape)
            rows.append(f"| `{escape(shape)}` | {escape(text)} |")
        elif not parameter.hidden and "--help" not in parameter.opts:
            names = ", ".join([*parameter.opts, *parameter.secondary_opts])
            value = "" if parameter.is_flag else f" {option_value(parameter)}"
            rows.append(f"| `{names}{value}` | {escape(text)} |")
    usage = " ".join([name, *arguments, "[OPTIONS]"])
    text = markdown(inspect.cleandoc(command.help or ""))
    table = "\n".join(["| argument or option | meaning |", "|---|---|", *rows])
    return f"## `{name}`\n\n```text\n{usage}\n```\n\n{text}\n\n{table}\n"


def option_value(parameter: Any) -> str:
    """Return how the value of an option is written."""
    choices = getattr(parameter.type, "choices", None)
    if choices:
        return "\\|".join(str(getattr(choice, "value", choice)) for choice in choices)
    return str(parameter.metavar or parameter.type.name.upper())


def events_table() -> str:
    """Return a table of the kinds of events and their keys."""
    from pilot_flwr.run import events

    rows = ["| `event` | when | keys |", "|---|---|---|"]
    common = {"elapsed", "exchange"}
    for kind, cls in events.KINDS.items():
        names = [f.name for f in dataclasses.fields(cls) if f.name not in common]
        keys = ", ".join(f"`{events._KEYS.get(name, name)}`" for name in names)
        when = markdown((cls.__doc__ or "").strip().split("\n\n")[0])
        rows.append(f"| `{kind}` | {escape(when)} | {keys} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Insert generated tables where a page asks for them."""
    if page.file.src_uri == "reference/run-folder.md":
        return markdown.replace("<!-- events -->", events_table())
    return markdown
