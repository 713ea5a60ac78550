"""Figures and tables for chapters and decks, made so that stored outputs can be compared byte by byte.

A figure is an SVG with fixed identifiers and no date. Its colours are CSS custom properties (with the light theme's value as
fallback), so that one stored figure serves the light and the dark theme; its text stays text, so that it is read aloud and scales.
"""
from __future__ import annotations

import hashlib
import html
import io
import re

#: Colours by role. Predicted, measured and explained have the same colour on every page; the theme gives the dark values.
PALETTE = {
    "ink": "#1d2733", "muted": "#5b6673", "grid": "#d9dcd6", "paper": "#fcfbf8",
    "predict": "#1d5fa8", "measure": "#b4500f", "explain": "#27744a",
    "c1": "#1d5fa9", "c2": "#b4500e", "c3": "#27744b", "c4": "#8a3f8f", "c5": "#8a6a00", "c6": "#3a7d8c", "c7": "#a03048",
}
CYCLE = [PALETTE[f"c{i}"] for i in range(1, 8)]


def style():
    """matplotlib's rcParams of the course."""
    from cycler import cycler

    ink, muted, grid = PALETTE["ink"], PALETTE["muted"], PALETTE["grid"]
    return {
        "svg.hashsalt": "scaling-measured", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 13,
        "figure.figsize": (8.6, 4.2), "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "figure.constrained_layout.use": True, "axes.prop_cycle": cycler(color=CYCLE), "axes.edgecolor": muted,
        "axes.labelcolor": ink, "axes.titlecolor": ink, "axes.titlesize": 14, "axes.titlelocation": "left", "text.color": ink,
        "xtick.color": muted, "ytick.color": muted, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": grid, "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 12, "lines.linewidth": 2.4,
    }


def subplots(*args, **kwargs):
    """`plt.subplots` in the course's style, on a figure of its own that no notebook backend shows a second time.

    Returns (figure, axes), as pyplot does. Sets matplotlib's rcParams for the process, since legends and labels read them late.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(style())
    fig = Figure(figsize=kwargs.pop("figsize", None))
    FigureCanvasSVG(fig)
    return fig, fig.subplots(*args, **kwargs)


class Picture:
    """An SVG with its alternative text and caption; what a cell that draws ends with."""

    def __init__(self, svg: str, alt: str, caption: str | None = None):
        self.svg, self.alt, self.caption = svg, alt, caption

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/svg+xml": self.svg, "text/plain": f"Figure: {self.alt}"}

    def __repr__(self):
        return f"Figure: {self.alt}"


def svg(fig, alt: str, caption: str | None = None) -> Picture:
    """`fig` (a matplotlib figure) as a `Picture`. `alt` says in a sentence or two what the picture shows, and is required.

    Raises ValueError for an empty `alt`.
    """
    if not isinstance(alt, str) or len(alt.strip()) < 15:
        raise ValueError(f"svg(alt={alt!r}): say in a sentence what the picture shows, for readers who cannot see it")
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(style()):
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(_tidy(out.getvalue(), alt.strip(), caption), alt.strip(), caption)


def _tidy(text: str, alt: str, caption: str | None) -> str:
    """Matplotlib's SVG made fit to stand in a page: unique ids, themed colours, a title, no prologue, no fixed size."""
    text = text[text.index("<svg"):]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r"#([\w.\-]+)[\")]", text))
    mark = hashlib.sha256(text.encode()).hexdigest()[:6]
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{m[1]}-{mark}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(#|href=\"#)([\w.\-]+)", rf"\g<1>\g<2>-{mark}", text)
    for role, colour in PALETTE.items():
        text = re.sub(rf"(?<=[: ]){colour}\b", f"var(--fig-{role}, {colour})", text)
    text = re.sub(r"font-family: [^;\"]*sans-serif", "font-family: var(--fig-font, sans-serif)", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1), count=1)
    # A style that stands in the document once for every figure would be a global rule, so say it on the root instead.
    text = re.sub(r'\s*<defs>\s*<style type="text/css">.*?</style>\s*</defs>', "", text, flags=re.S)
    label = html.escape(alt, quote=True)
    note = f' data-caption="{html.escape(caption, quote=True)}"' if caption else ""
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}"{note} style="stroke-linejoin: round; stroke-linecap: butt" ', 1)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


class Table:
    """Rows as a Markdown table: what a cell that tabulates ends with."""

    def __init__(self, markdown: str):
        self.markdown = markdown

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/markdown": self.markdown, "text/plain": self.markdown}

    def __repr__(self):
        return self.markdown


def table(rows, headers, align: str | None = None, caption: str | None = None) -> Table:
    """A Markdown table. `rows`: sequences as long as `headers`; `align`: a letter a column, "l" or "r" (default: l, then r).

    Raises ValueError when a row's length or `align` does not match the headers.
    """
    headers, rows = [str(h) for h in headers], [[str(c) for c in row] for row in rows]
    align = align or "l" + "r" * (len(headers) - 1)
    if len(align) != len(headers) or set(align) - set("lrc"):
        raise ValueError(f"table(align={align!r}): one of l, r, c for each of the {len(headers)} columns")
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"table: a row of {len(row)} cells under {len(headers)} headers: {row}")
    def line(cells):
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    marks = {"l": ":---", "r": "---:", "c": ":---:"}
    text = [line(headers), "|" + "|".join(marks[a] for a in align) + "|", *map(line, rows)]
    return Table("\n".join(text) + (f"\n\n: {caption}" if caption else ""))
