"""Tables of the two scenarios, of Pilot's ablations, of compressed uploads and of the search."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilot_flwr.formatting import human_bytes
from pilot_flwr.run.tables import markdown
from pilot_flwr.sweeps.compare import (
    Comparison,
    CsvRow,
    MethodScores,
    as_markdown,
    compare,
    interval_text,
    p_text,
)
from pilot_flwr.sweeps.results import read_rows
from scenarios.compression import DTYPES
from scenarios.search import CANDIDATES, FIRST, chosen, read_scores, searched, trained_methods
from scenarios.sweeps import ABLATIONS, METHODS, SCENARIOS

PILOT = "pilot"
OVERVIEW = ("zero_shot", "local", "fedit", "fedavg_per_task", PILOT, "centralised")
"""The README's methods."""


def scenario_tables(folder: Path) -> dict[str, str]:
    """Return the tables of all results in a folder, by name."""
    tables = {}
    for scenario in SCENARIOS:
        if (folder / f"{scenario}.csv").exists():
            made = methods_table(folder / f"{scenario}.csv")
            tables[scenario] = f"{made}\n{effort(folder, scenario, METHODS)}\n"
    if len(tables) == len(SCENARIOS):
        tables["ablations"] = ablations_table(folder)
        tables["overview"] = overview_table(folder)
    if all((folder / f"compression-{scenario}.csv").exists() for scenario in SCENARIOS):
        tables["compression"] = compression_table(folder)
    if all((folder / f"search-{scenario}.csv").exists() for scenario in SCENARIOS):
        tables["rates"] = rates_table(folder)
    return tables


def methods_table(results: Path) -> str:
    """Return a scenario's table: a row per method, tested against Pilot."""
    return as_markdown(comparison(results, METHODS), costs=True)


def comparison(results: Path, methods: Sequence[str]) -> Comparison:
    """Return a scenario's methods in the given order, compared with Pilot."""
    rows = [row for row in read_rows(results) if row["method"] in methods]
    rows.sort(key=lambda row: methods.index(row["method"]))
    (found,) = compare(rows, PILOT)
    return found


def overview_table(folder: Path) -> str:
    """Return the README's table: the mean over tasks of some methods on both scenarios."""
    found = [comparison(folder / f"{name}.csv", METHODS) for name in SCENARIOS]
    means = [{m.label: interval_text(m.interval()) for m in one.methods} for one in found]
    rows = [["method", "tasks of one kind", "tasks of different kinds"]]
    rows += [[label, *(of[label] for of in means)] for label in OVERVIEW]
    legend = "Mean over tasks and 5 seeds ± half the width of its 95 % interval (Student's t)."
    return f"{markdown(rows)}\n{legend}\n"


def ablations_table(folder: Path) -> str:
    """Return Pilot's ablations on both scenarios: means, and differences to Pilot with their p."""
    found = [comparison(folder / f"{name}.csv", (PILOT, *ABLATIONS)) for name in SCENARIOS]
    rows = beside(found, (PILOT, *ABLATIONS))
    sources = [effort(folder, scenario, ABLATIONS) for scenario in SCENARIOS]
    below = legend(found, PILOT, len(ABLATIONS))
    return f"{markdown(rows)}\n{below}\n\n{sources[0]}\n\n{sources[1]}\n"


def compression_table(folder: Path) -> str:
    """Return Pilot with compressed uploads on both scenarios, against bfloat16."""
    labels = [f"{PILOT} model.sent_dtype={dtype}" for dtype in DTYPES]
    files = [f"compression-{scenario}" for scenario in SCENARIOS]
    data = [read_rows(folder / f"{name}.csv") for name in files]
    found = [compare(rows, labels[0])[0] for rows in data]
    sent = {method.label: method.costs.get("bytes_up") for method in found[0].methods}
    header, *rows = beside(found, labels)
    rows = [[*row, human_bytes(sent[row[0]] or 0)] for row in rows]
    below = legend(found, DTYPES[0], len(DTYPES) - 1)
    machine = machine_of(folder / "compression.json", "")
    sources = [
        f"`{name}.csv`: {code_of(rows)}{machine}" for name, rows in zip(files, data, strict=True)
    ]
    table = markdown([[*header, "sent up in a run"], *rows])
    return f"{table}\n{below}\n\n{sources[0]}\n\n{sources[1]}\n"


def beside(found: Sequence[Comparison], labels: Sequence[str]) -> list[list[str]]:
    """Return the methods with these labels, both scenarios side by side, header first."""
    methods = [{method.label: method for method in one.methods} for one in found]
    header = ["method"]
    for scenario in SCENARIOS:
        header += [f"{scenario}: mean", f"{scenario}: difference", f"{scenario}: p"]
    rows = [
        [label, *(cell for one in methods for cell in cells(one[label]))]
        for label in methods[0]
        if label in labels
    ]
    return [header, *rows]


def legend(found: Sequence[Comparison], baseline: str, comparisons: int) -> str:
    """Explain the columns of `beside`."""
    seeds = sorted({len(method.seeds) for one in found for method in one.methods})
    return (
        f"Mean over tasks and {', '.join(map(str, seeds))} seeds ± half the width of its 95 % "
        f"interval (Student's t). p: two-sided paired t-test over seeds against {baseline}, "
        f"Holm-corrected for {comparisons} comparisons in each scenario."
    )


def cells(method: MethodScores) -> list[str]:
    """Return a method's mean, difference to the baseline and p."""
    difference = interval_text(method.test.difference, sign="+") if method.test else ""
    return [interval_text(method.interval()), difference, p_text(method.p)]


def rates_table(folder: Path) -> str:
    """Return the search's table: a row per method and scenario."""
    rows = [["method", "setting", "scenario", "candidates: score with the first seed", "chosen"]]
    for method in trained_methods():
        for scenario in SCENARIOS:
            found = read_scores(folder / f"search-{scenario}.csv")[method]
            values = CANDIDATES[searched(method)]
            shown = [
                f"{value}: {score_of(found[f'{searched(method)}={value}'][FIRST])}"
                for value in values
            ]
            value = chosen(found).partition("=")[2]
            edge = " (edge)" * (float(value) in (values[0], values[-1]))
            row = [method, f"`{searched(method)}`", scenario, ", ".join(shown), value + edge]
            rows.append(row)
    searches = [read_rows(folder / f"search-{scenario}.csv") for scenario in SCENARIOS]
    code = code_of([row for found in searches for row in found])
    return f"{markdown(rows)}\n{code}{machine_of(folder / 'search.json', 'both searches')}\n"


def score_of(score: float) -> str:
    """Format a score, or ``diverged``."""
    return f"{score:.3f}" if score >= 0 else "diverged"


def effort(folder: Path, scenario: str, methods: Sequence[str]) -> str:
    """Return the number of a table's runs, their time, code and machine."""
    rows = [row for row in read_rows(folder / f"{scenario}.csv") if row["method"] in methods]
    machine = machine_of(folder / "compare.json", "both tables and the ablations")
    return f"`{scenario}.csv`: {code_of(rows)}{machine}"


def code_of(rows: Sequence[CsvRow]) -> str:
    """Return commits and versions of rows, and the time of their runs."""
    commits = sorted({row["commit"][:12] + "+" * (row["changed"] == "true") for row in rows})
    versions = sorted({row["versions"] for row in rows})
    minutes = sum(float(row["seconds"]) for row in rows if row["seconds"]) / 60
    return (
        f"{len(rows)} runs of {minutes:.0f} min in all; commit {', '.join(commits)}; "
        f"{'; '.join(versions)}"
    )


def machine_of(path: Path, what: str) -> str:
    """Return the machine and time of a record."""
    if not path.exists():
        return ""
    record: dict[str, Any] = json.loads(path.read_text())
    machine, results = record["machine"], record["results"]
    took = results["wall_seconds"]
    whole = "" if took is None else f"; {what} took {took / 60:.0f} min"
    return (
        f"; {results['side_by_side']} side by side on {machine['cores']} cores of "
        f"{machine['cpu']}{whole}"
    )
