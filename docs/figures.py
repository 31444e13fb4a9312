"""Draw the figure of the method, once for light and once for dark pages.

Run ``python docs/figures.py``; it writes ``docs/assets/method-light.svg`` and ``…-dark.svg``.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
PALETTES = {
    "light": {
        "ink": "#1f2328", "soft": "#59636e", "line": "#8c959f", "panel": "#f6f8fa",
        "edge": "#d1d9e0", "travels": "#0969da", "travels_fill": "#ddf4ff",
        "stays": "#bc4c00", "stays_fill": "#fff1e5", "base": "#59636e", "base_fill": "#e6eaef",
    },
    "dark": {
        "ink": "#f0f6fc", "soft": "#9198a1", "line": "#656c76", "panel": "#151b23",
        "edge": "#3d444d", "travels": "#4493f8", "travels_fill": "#121d2f",
        "stays": "#f0883e", "stays_fill": "#2b1c10", "base": "#9198a1", "base_fill": "#262c36",
    },
}  # fmt: skip
WIDTH, HEIGHT = 980, 640
MATHS = 'font-family="Cambria Math, STIX Two Math, DejaVu Serif, serif"'
TITLE = "Pilot: what a client trains in each stage, what stays with it and what travels"


class Drawing:
    """SVG elements in the colours of one palette."""

    def __init__(self, palette: dict[str, str]) -> None:
        self.palette, self.parts = palette, list[str]()

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 14,
        colour: str = "ink",
        anchor: str = "middle",
        extra: str = "",
    ) -> None:
        """Add a line of text; `words` may hold markup."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{self.palette[colour]}" {extra}>{words}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        kind: str,
        *lines: str,
        dashed: bool = False,
        size: float = 14,
    ) -> None:
        """Add a rounded box of `kind` with centred lines; the first may be a symbol."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" '
            f'fill="{self.palette[f"{kind}_fill"]}" stroke="{self.palette[kind]}" '
            f'stroke-width="1.6"{dash}/>'
        )
        step = size + 4
        top = y + h / 2 - step * (len(lines) - 1) / 2 + size * 0.35
        for index, line in enumerate(lines):
            symbol = line.startswith("$")
            self.text(
                x + w / 2,
                top + step * index,
                line.lstrip("$"),
                size=size + 3 if symbol else size,
                extra=f'{MATHS} font-style="italic"' if symbol else "",
            )

    def panel(self, x: float, y: float, w: float, h: float) -> None:
        """Add a background for one machine."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="12" '
            f'fill="{self.palette["panel"]}" stroke="{self.palette["edge"]}"/>'
        )

    def outline(self, x: float, y: float, w: float, h: float, label: str) -> None:
        """Add a thin frame around parts that belong together, labelled above."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="10" fill="none" '
            f'stroke="{self.palette["edge"]}" stroke-width="1.4"/>'
        )
        self.text(x + w / 2, y - 7, label, size=13, colour="soft")

    def arrow(self, points: str, *, colour: str = "line", width: float = 1.8) -> None:
        """Add an arrow along `points`."""
        self.parts.append(
            f'<polyline points="{points}" fill="none" stroke="{self.palette[colour]}" '
            f'stroke-width="{width}" marker-end="url(#{colour})"/>'
        )

    def svg(self) -> str:
        """Return the document."""
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto-start-reverse">'
            f'<path d="M0 0 L10 5 L0 10 z" fill="{self.palette[name]}"/></marker>'
            for name in ("line", "travels")
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'role="img" aria-label="{TITLE}" font-family="-apple-system, BlinkMacSystemFont, '
            f"'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif\">\n<title>{TITLE}</title>\n"
            f"<defs>{heads}</defs>\n{body}\n</svg>\n"
        )


def sub(symbol: str, below: str = "", above: str = "") -> str:
    """Return a symbol with small indices."""
    parts = [symbol]
    if below:
        parts.append(f'<tspan font-size="11" dy="4">{below}</tspan>')
    if above:
        up = -11 if below else -7
        parts.append(f'<tspan font-size="11" dy="{up}">{above}</tspan>')
    return "".join(parts)


def client(draw: Drawing, x: float, title: str, when: str, connector: float) -> None:
    """Draw what both stages share: data, frozen tower and language model with its LoRA."""
    draw.panel(x, 14, 464, 342)
    draw.text(x + 18, 44, title, size=18, anchor="start", extra='font-weight="600"')
    draw.text(x + 446, 44, when, colour="soft", anchor="end")
    draw.box(x + 16, 172, 78, 68, "stays", "images,", "questions,", "answers", size=13)
    draw.box(x + 116, 172, 70, 68, "base", "vision", "tower", size=13)
    draw.arrow(f"{x + 94},206 {x + 115},206")
    draw.arrow(f"{x + 186},206 {x + 198 + (connector - 150) / 20},206")
    draw.arrow(f"{x + 217 + connector},206 {x + 229 + connector},206")
    left = x + 230 + connector
    draw.box(left, 110, x + 450 - left, 192, "base")
    middle = (left + x + 450) / 2
    draw.text(middle, 166, "language", size=13)
    draw.text(middle, 182, "model", size=13)
    draw.box(
        left + 8, 226, x + 450 - left - 16, 60, "travels", "$" + sub("Θ", "l"), "LoRA", size=13
    )


def figure(palette: dict[str, str]) -> str:
    """Return the whole figure."""
    draw = Drawing(palette)

    client(draw, 14, "Stage 1", "on client k, exchange 1", 130)
    draw.outline(213, 101, 148, 210, "connector")
    draw.box(222, 110, 130, 72, "travels", "$" + sub("ψ", "t"), "task adapter", size=13)
    draw.text(287, 213, "+", size=20)
    draw.box(222, 230, 130, 72, "stays", "$" + sub("ψ", "s"), "client adapter", size=13)
    draw.text(
        246, 336, "The difference loss keeps task and client features apart.", size=13,
        colour="soft",
    )  # fmt: skip

    client(draw, 502, "Stage 2: CT-MoA", "from exchange 2", 150)
    draw.outline(702, 58, 166, 252, "connector")
    draw.box(710, 66, 150, 34, "stays", "router φ, per token", size=13)
    draw.box(710, 110, 150, 48, "travels", "own task " + sub("ψ", "t", "1"), size=13)
    draw.text(785, 173, "+", size=16)
    draw.box(710, 182, 71, 48, "travels", "other " + sub("ψ", "t", "i"), dashed=True, size=13)
    draw.box(789, 182, 71, 48, "stays", "cross " + sub("ψ", "c", "i"), size=13)
    draw.text(785, 246, "+", size=16)
    draw.box(710, 254, 150, 48, "stays", "client adapter " + sub("ψ", "s"), dashed=True, size=13)
    draw.text(
        734, 336, "The router weighs all T task adapters for every visual token.", size=13,
        colour="soft",
    )  # fmt: skip

    draw.arrow("246,358 246,434", colour="travels", width=3)
    draw.text(262, 392, "own " + sub("ψ", "t"), anchor="start")
    draw.text(262, 412, "own " + sub("Θ", "l"), anchor="start")
    draw.arrow("560,434 560,360", colour="travels", width=3)
    draw.text(576, 392, "all T adapters " + sub("ψ", "t"), anchor="start")
    draw.text(576, 412, "this client’s mix " + sub("Θ̄", "l"), anchor="start")
    draw.arrow("800,358 800,434", colour="travels", width=3)
    draw.text(816, 392, "own " + sub("ψ", "t"), anchor="start")
    draw.text(816, 412, "own " + sub("Θ", "l"), anchor="start")

    draw.panel(14, 438, 952, 132)
    draw.text(32, 468, "Server", size=18, anchor="start", extra='font-weight="600"')
    draw.text(948, 468, "after every exchange", colour="soft", anchor="end")
    draw.box(
        32, 482, 448, 74, "travels",
        "Task adapters: average within each task,",
        "weighted by training examples",
    )  # fmt: skip
    draw.box(
        500, 482, 448, 74, "travels",
        "LoRA: a mix for each client of its own and its M nearest,",
        "weighted by inverse distance",
    )  # fmt: skip

    legend = [
        (32, "travels", "travels between client and server", False),
        (312, "stays", "never leaves the client", False),
        (530, "base", "frozen base model, on every site", False),
        (806, "line", "dashed: not trained", True),
    ]
    for x, kind, words, dashed in legend:
        fill = palette.get(f"{kind}_fill", "none")
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        draw.parts.append(
            f'<rect x="{x}" y="594" width="20" height="20" rx="4" fill="{fill}" '
            f'stroke="{palette[kind]}" stroke-width="1.6"{dash}/>'
        )
        draw.text(x + 28, 609, words, anchor="start", colour="soft")
    return draw.svg()


def main() -> None:
    """Write both files."""
    for name, palette in PALETTES.items():
        (ASSETS / f"method-{name}.svg").write_text(figure(palette), encoding="utf-8")


if __name__ == "__main__":
    main()
