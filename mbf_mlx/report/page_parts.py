"""The parts of a report's page: one HTML file that fetches nothing, for light and dark screens, phones and paper.

Every text is escaped here. plots.py draws the plots; the numbers of each plot are also in a table.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from mbf_mlx import __version__
from mbf_mlx.report.plots import Curve, lines
from mbf_mlx.report.terminal import percent

CURVES = 8  # most lines in one plot

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #c9ced6; --heat: #5aa9e6; --c0: #1668b3;
  --c1: #b4500b; --c2: #187a4b; --c3: #8a3fa8; --c4: #a8233f; --c5: #0b7a80; --c6: #7a6200; --c7: #5b5f66 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ed; --soft: #3d444d; --heat: #1f62a8;
  --c0: #6cb2f2; --c1: #f0a061; --c2: #5ecb95; --c3: #cf96e8; --c4: #f08a9c; --c5: #5fc9cf; --c6: #d9c15a;
  --c7: #a9b0b8 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--soft) }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem }
p { margin: .4rem 0; max-width: 46rem }
.scroll { overflow-x: auto; margin: .75rem 0 }
svg { display: block; max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--soft); white-space: nowrap }
th { font-weight: 600; vertical-align: bottom }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
table:not(.text) :is(td, th):first-child { white-space: normal; min-width: 7rem }
table.compared :is(td, th):first-child { min-width: 8.5rem }
table.compared :is(td, th):nth-child(2) { text-align: left; white-space: normal; min-width: 5rem }
table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere }
table.text td:first-child { white-space: nowrap; padding-right: 1.5rem; vertical-align: top }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper) }
.row { display: flex; flex-wrap: wrap; gap: 0 2.5rem } .row > .scroll { max-width: 100% }
details { margin: .5rem 0 }
summary { cursor: pointer; padding: .2rem 0 }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere }
.big { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1rem 0 }
.big div { min-width: 7rem } .big b { display: block; font-size: 1.6rem; font-weight: 600; line-height: 1.2 }
.big span { font-size: .875rem }
footer { margin-top: 3rem; font-size: .875rem }
@media (max-width: 30rem) { body { padding: 1rem .9rem 3rem } th, td { padding: .3rem .45rem }
  table:not(.text) :is(td, th):first-child { max-width: 8rem } }
@media print { :root { --paper: #fff; --ink: #000; --soft: #bbb; --heat: #8cc4ee; --c0: #1668b3; --c1: #b4500b;
  --c2: #187a4b; --c3: #8a3fa8; --c4: #a8233f; --c5: #0b7a80; --c6: #7a6200; --c7: #5b5f66 }
  body { max-width: none; padding: 0; font-size: 11pt } .scroll { overflow: visible }
  svg { max-width: 100% } figure, table, svg { break-inside: avoid } h2, h3 { break-after: avoid }
  details::details-content { content-visibility: visible; height: auto } }
"""

MARK = '<meta name="generator" content="mbf-mlx">'  # near the beginning of a page of ours
FOOTER = "<footer>mbf-mlx "  # near its end, also in pages that have no mark yet


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """Return the whole page."""
    body = "\n".join(parts)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(subtitle)}</p>
{body}
{FOOTER}{escape(__version__)}</footer>
</body>
</html>
"""


def section(title: str, words: str = "") -> str:
    """Return the heading of a section, and a paragraph of words under it."""
    return f"<h2>{escape(title)}</h2>" + (f"<p>{escape(words)}</p>" if words else "")


def scroll(inside: str) -> str:
    """Return a part that scrolls sideways if it is wider than the screen."""
    return f'<div class="scroll" tabindex="0">{inside}</div>'


def row(parts: Iterable[str]) -> str:
    """Return parts that stand side by side if there is room."""
    return '<div class="row">' + "".join(scroll(part) for part in parts) + "</div>"


def details(title: str, inside: str, wrap: bool = True) -> str:
    """Return a part that is folded away until the reader opens it."""
    return f"<details><summary>{escape(title)}</summary>{scroll(inside) if wrap else inside}</details>"


def big(numbers: Sequence[tuple[str, str]]) -> str:
    """Return a few large numbers, each given as (name, value)."""
    return (
        '<div class="big">'
        + "".join(f"<div><b>{escape(v)}</b><span>{escape(n)}</span></div>" for n, v in numbers)
        + "</div>"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """Return a table; every cell is shown as text."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


def charts(
    curves: Sequence[Curve], xlabel: str, ylabel: str, title: str, *, share: bool = False, digits: int = 3
) -> list[str]:
    """Return the curves as plots of at most CURVES lines each, and all their numbers in one table.

    Args:
        curves: The curves; `share` says that their values are in [0, 1] and shown in percent.
        xlabel, ylabel, title: Words of the axes, and the name of the plots.
        digits: Decimals of the table's numbers, if they are no shares.
    """
    plots = []
    for first in range(0, len(curves), CURVES):
        some, name = curves[first : first + CURVES], f"{title} {first // CURVES + 1}"
        plots.append(lines(some, xlabel, ylabel, name, percent=share, beside=curves))
    places = sorted({x for curve in curves for x in curve.x})

    def shown(value: float | None) -> str:
        if value is None:
            return ""
        return percent(value) if share else f"{value:.{digits}f}"

    rows = []
    for x in places:
        values = [dict(zip(curve.x, curve.y)).get(x) for curve in curves]
        rows.append([f"{x:g}", *map(shown, values)])
    return [row(plots), details("As a table", table([xlabel, *(curve.name for curve in curves)], rows))]


def settings(document: dict[str, Any]) -> str:
    """Return nested settings as a table of dotted names and values."""
    flat: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat.append((prefix, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))

    walk("", document)
    rows = "".join(f"<tr><td>{escape(k)}</td><td><code>{escape(v)}</code></td></tr>\n" for k, v in flat)
    return scroll(f'<table class="text"><tbody>\n{rows}</tbody></table>')
