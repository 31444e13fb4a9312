"""A comparison of methods, written down as Markdown or LaTeX.

To add a format, write a function beside `as_markdown` that words `_cells` and `_legend` in it.
"""

from pilot_flwr.sweeping.statistics import Interval
from pilot_flwr.sweeping.table import UNTOUCHED, Comparison, Line
from pilot_flwr.wording import count, human_bytes, human_seconds

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%#_{}$"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
)


def as_markdown(comparison: Comparison, *, costs: bool = False) -> str:
    """Return a table as Markdown, with its title and what its figures mean."""
    cells = _cells(comparison, costs)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text = [f"**{comparison.title}**", "", *lines, "", *_legend(comparison)]
    return "\n".join(text) + "\n"


def as_latex(comparison: Comparison, *, costs: bool = False) -> str:
    r"""Return a table as LaTeX for the package booktabs, title and legend as comments."""
    header, *rows = _cells(comparison, costs)
    body = [" & ".join(map(_escape, row)) + r" \\" for row in rows]
    comments = [comparison.title, *_legend(comparison)]
    return "\n".join(
        [
            *(f"% {line}" for line in comments if line),
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(map(_escape, header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _cells(comparison: Comparison, costs: bool) -> list[list[str]]:
    tested = comparison.baseline is not None
    header = ["method", "n", *comparison.tasks, "mean"]
    header += [f"difference to {comparison.baseline}", "p"] if tested else []
    header += ["sent up", "sent down", "time"] if costs else []
    cells = [header]
    for line in comparison.lines:
        row = [line.label, str(len(line.seeds))]
        row += [_plain(line.tasks[task]) for task in comparison.tasks]
        row.append(_plain(line.mean))
        if tested:
            row += [_difference(line), _p(line.p)]
        if costs:
            sizes = [line.bytes_up, line.bytes_down]
            row += ["" if size is None else human_bytes(size) for size in sizes]
            row.append("" if line.seconds is None else human_seconds(line.seconds))
        cells.append(row)
    return cells


def _difference(line: Line) -> str:
    if line.test is None:
        return ""
    sign = "+" if line.test.difference.mean >= 0 else ""
    pairs = "" if line.test.pairs == len(line.seeds) else f" ({line.test.pairs} pairs)"
    return sign + _plain(line.test.difference) + pairs


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _plain(found: Interval) -> str:
    text = f"{found.mean:.3f}"
    return text if found.half_width is None else f"{text} ± {found.half_width:.3f}"


def _legend(comparison: Comparison) -> list[str]:
    kinds = set(comparison.metrics.values())
    metric = ", ".join(f"{task}: {name}" for task, name in comparison.metrics.items())
    lines = [
        f"Scores: {kinds.pop() if len(kinds) == 1 else metric}. Mean over n seeds ± half the width "
        "of its 95 % interval (Student's t); `mean` is over the tasks."
    ]
    if comparison.baseline is not None:
        tests = sum(line.p is not None for line in comparison.lines)
        lines.append(
            f"p: two-sided paired t-test over seeds of `mean` against {comparison.baseline}, "
            f"Holm-corrected for {count(tests, 'comparison')}."
        )
    if len({len(line.seeds) for line in comparison.lines if line.label != UNTOUCHED}) > 1:
        lines.append("The methods have different numbers of seeds.")
    return lines + comparison.notes


def _escape(text: str) -> str:
    return text.translate(_LATEX)
