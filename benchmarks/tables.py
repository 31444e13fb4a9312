"""Generate the tables of README and documentation from ``benchmarks/results``.

Run ``python benchmarks/tables.py`` to print the benchmark table, ``--readme`` to regenerate every
table of `PAGES`: the text between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

from _own_tables import OWN_TABLES, exchange_table, note
from _record import RESULTS, ROOT
from _rows import ROWS
from emoji.tables import emoji_tables

from pilot_flwr.run.tables import markdown

PAGES = {
    "README.md": ("demo", "emoji_overview", "exchange"),
    "docs/tutorials/first-run.md": ("demo", "timeline"),
    "docs/reference/models.md": ("families",),
    "docs/how-to/deployment.md": ("deployment", "payload"),
    "docs/how-to/privacy.md": ("privacy",),
    "docs/how-to/many-clients.md": ("clients",),
    "docs/explanation/results.md": (
        "emoji_methods",
        "emoji_kinds",
        "emoji_seen",
        "emoji_by_task",
        "emoji_questions",
        "emoji_by_kind",
        "emoji_no_private",
        "emoji_private",
        "emoji_without",
        "emoji_same_tasks",
        "emoji_forced",
        "emoji_swapped",
        "emoji_terms",
        "emoji_single",
        "emoji_auto",
        "emoji_variants",
        "emoji_real",
    ),
    "docs/explanation/emoji.md": ("emoji_gate", "emoji_rates", "emoji_power"),
    "docs/explanation/scale.md": ("aggregation", "sketch"),
    "docs/explanation/benchmarks.md": ("benchmarks", "plan", "training_step"),
}
"""Page → its tables, in order."""


def table(folder: Path = RESULTS) -> str:
    """Return the table of all result files present, with a note on each measurement."""
    rows = [["measured", "figure", "goal"]]
    notes = []
    for name, rows_of in ROWS.items():
        path = folder / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            rows += rows_of(record["results"])
            notes.append(note(record))
    return markdown(rows) + "".join(f"\n- {line}" for line in notes) + "\n"


def all_tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return the tables of all result files present, by name."""
    contents = {"benchmarks": table(folder)}
    demo = folder / "demo.json"
    if demo.exists():
        record = json.loads(demo.read_text())
        body = record["results"]["timeline"].split("\n\n", 1)[1]  # without its heading
        contents |= {
            "demo": f"{record['results']['summary']}\n{note(record)}\n",
            "timeline": body,
        }
    for name, made in OWN_TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            contents[name] = made(json.loads(path.read_text()))
    if all((folder / f"{name}.json").exists() for name in ("deployment", "payload")):
        records = (
            json.loads((folder / f"{n}.json").read_text()) for n in ("deployment", "payload")
        )
        contents["exchange"] = exchange_table(*records)
    return contents | emoji_tables(folder / "emoji")


def updated(text: str, tables: Mapping[str, str]) -> str:
    """Return a page with its tables replaced; one that is not among `tables` is unchanged."""
    for name, content in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, new=content: m[1] + new + m[2], text, flags=re.DOTALL)
    return text


def main() -> None:
    """Print the benchmark table, or regenerate the pages' tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="regenerate the tables of all pages")
    if parser.parse_args().readme:
        tables = all_tables()
        for page in PAGES:
            (ROOT / page).write_text(updated((ROOT / page).read_text(), tables))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
