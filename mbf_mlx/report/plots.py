"""The plots of a report as SVG, drawn by matplotlib, in the page's own colours.

Plots are drawn in placeholder colours, which are then replaced by the page's CSS variables: one picture serves light
screens, dark screens and paper. Text stays text. Scores are in [0, 1] and shown in percent.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

INK, SOFT, HEAT = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0c0{i}" for i in range(8))
MARKERS = "osD^vPX*"
_VARIABLES = {INK: "--ink", SOFT: "--soft", HEAT: "--heat", **{c: f"--c{i}" for i, c in enumerate(SERIES)}}
_STYLE = {
    "svg.fonttype": "none",
    "figure.constrained_layout.w_pad": 0.15,  # inches: the last number of an axis is wider than the axis
    "text.parse_math": False,  # a task may be called "$x"
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": SOFT,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


class Curve(NamedTuple):
    """One line of a plot; a y of None is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


class Bar(NamedTuple):
    """One dot of a comparison, with its deviation over seeds."""

    name: str
    value: float
    deviation: float | None


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str) -> str:
    """Return a matrix of scores, with values[row][column]; a score of None leaves its cell empty."""
    cell = 0.62
    width = cell * len(columns) + 0.085 * max(len(name) for name in rows) + 0.4
    with _Drawing(width, cell * 0.8 * len(rows) + 0.085 * max(map(len, columns)) + 0.3) as (figure, axes):
        from matplotlib.patches import Rectangle

        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if value is None:
                    continue
                share = min(1.0, max(0.0, value))
                axes.add_patch(Rectangle((j, i), 0.96, 0.94, facecolor=HEAT, alpha=0.06 + 0.94 * share, linewidth=0))
                axes.text(j + 0.48, i + 0.47, f"{100 * value:.0f}", ha="center", va="center")
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks([j + 0.48 for j in range(len(columns))], list(columns), rotation=45, ha="left")
        axes.set_yticks([i + 0.47 for i in range(len(rows))], list(rows))
        axes.xaxis.tick_top()
        for side in axes.spines.values():
            side.set_visible(False)
        return _svg(figure, title)


def lines(
    curves: Sequence[Curve],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    percent: bool = False,
    beside: Sequence[Curve] = (),
) -> str:
    """Return curves over a whole number such as a step, each in its own colour and with its own marker.

    Args:
        curves: What is drawn.
        xlabel, ylabel, title: Words of the axes; the title names the picture for screen readers.
        percent: Whether values are in [0, 1] and shown in percent.
        beside: Curves of other plots beside this one. The y axis has room for them, so that plots can be compared.
    """
    share = 100 if percent else 1
    known = [share * v for curve in (*curves, *beside) for v in curve.y if v is not None]
    many = max(len(curve.x) for curve in curves) > 12
    with _Drawing(5.6, 3.0 + 0.2 * ((len(curves) + 1) // 2)) as (figure, axes):
        for number, curve in enumerate(curves):
            color, marker = SERIES[number % len(SERIES)], "" if many else MARKERS[number % len(MARKERS)]
            style = "-" if number < len(SERIES) else "--"
            y = [float("nan") if v is None else share * v for v in curve.y]
            axes.plot(curve.x, y, style, color=color, marker=marker, label=curve.name)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if percent:
            axes.set_ylim(10 * (min(known, default=0) // 10) - 1, 10 * -(max(known, default=100) // -10) + 1)
        elif all(v >= 0 for v in known):
            axes.set_ylim(0, 1.08 * max(known, default=1) or 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower left", ncols=2, fontsize=9)
        return _svg(figure, title)


def comparison(bars: Sequence[Bar], xlabel: str, title: str, color: int = 0) -> str:
    """Return one dot with its deviation for each method, in the given order."""
    with _Drawing(5.2, 0.3 * len(bars) + 0.9) as (figure, axes):
        for place, bar in enumerate(bars):
            spread = 100 * (bar.deviation or 0)
            caps = 3 if spread else 0
            axes.errorbar(100 * bar.value, place, xerr=spread, fmt="o", color=SERIES[color], capsize=caps)
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlabel(xlabel)
        axes.grid(axis="both")
        axes.set_axisbelow(True)
        return _svg(figure, title)


class _Drawing:
    """A figure and its axes in our style, while a `with` block draws."""

    def __init__(self, width: float, height: float) -> None:
        self.size = (width, height)

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib
        from matplotlib.figure import Figure

        self.style = matplotlib.rc_context(_STYLE)
        self.style.__enter__()
        figure = Figure(figsize=self.size, layout="constrained")
        return figure, figure.subplots()

    def __exit__(self, *error: Any) -> None:
        self.style.__exit__(*error)


def _svg(figure: Any, title: str) -> str:
    """Return the figure as SVG for a page: with a name, the page's colours, and a width that follows the page."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # the same report has the same bytes; no two plots share ids
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    width = figure.get_figwidth() * 72  # points
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    # At 1.25 pixels a point, text has the size of the page's small print.
    wide = 1.25 * width
    style = f'style="width:{wide:.0f}px;min-width:{0.7 * wide:.0f}px" role="img" aria-label="{escape(title)}"'
    text = text.replace("<svg ", f"<svg {style} ", 1)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return re.sub(r"(font: [\d.]+px) [^;\"]+", r"\1 system-ui, sans-serif", text)
