"""The frame of a page, its style in light and dark, and its tables. Whatever comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from splitquant_plugins.evaluation.tables import Column, text

# Okabe and Ito's colours, told apart by colour-blind readers too; lighter ones where the ground is dark.
STYLE = """
:root{color-scheme:light dark;
--ground:#fff;--ink:#1d2126;--faint:#5d6670;--line:#d8dde2;--field:#f5f7f9;--front:#1d2126;
--c0:#6b7280;--c1:#0072b2;--c2:#c2570c;--c3:#00805c;--c4:#a8417c;--c5:#7a5cc0;--c6:#8a6d00;--c7:#b3261e}
@media (prefers-color-scheme:dark){:root{--ground:#14171a;--ink:#e6e9ec;--faint:#9aa4ae;--line:#343b42;--field:#1d2226;
--front:#e6e9ec;--c0:#9aa4ae;--c1:#56b4e9;--c2:#f0a04b;--c3:#3fc79a;--c4:#e29ac4;--c5:#b39df0;--c6:#d9bd3c;--c7:#f28b82}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.35rem;line-height:1.25;margin:.6rem 0}h2{font-size:1.1rem;margin:2rem 0 .4rem}
p{max-width:46rem;margin:.4rem 0}.faint{color:var(--faint)}
.wide{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.87rem}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{overflow-wrap:normal;background:var(--field);color:var(--faint);font-weight:600}tr:last-child td{border-bottom:0}
th.text,td.text{text-align:left}td.long{white-space:normal;min-width:12rem}tr.best td{font-weight:650}
td.bar{padding:0 .6rem;width:40%;min-width:8rem}
svg{display:block}svg.chart{width:100%;max-width:44rem;height:auto}svg.bar{width:100%;height:14px}
svg text{fill:var(--faint);font:12px system-ui,sans-serif}svg text.point{fill:var(--ink);font-weight:600;
paint-order:stroke;stroke:var(--ground);stroke-width:4px;stroke-linejoin:round}
.axis{stroke:var(--line)}.front{stroke:var(--front);fill:none;stroke-width:1.5}
.whole{stroke:var(--faint);stroke-dasharray:4 4}
.range{stroke:var(--line);stroke-width:2}.before{fill:var(--c0)}.after{fill:var(--c1)}.worse{fill:var(--c7)}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:.3rem 0;font-size:.87rem}
ul.legend i{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.4em;border:2px solid}
details{margin:.5rem 0}summary{cursor:pointer;font-weight:600}
@media (max-width:40rem){th,td{padding:.3rem .4rem}td.long{min-width:7rem}td.bar{min-width:5.5rem;width:30%}
table.bars th{white-space:normal}svg.chart text{font-size:18px}}
""".strip()
COLOURS = 8
FAINT, BEST, BARS = ' class="faint"', ' class="best"', ' class="bars"'


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """Return a page; `sections` are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style></head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="faint">{escape(subtitle)}</p>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def heading(words: str) -> str:
    """A heading of a section."""
    return f"<h2>{escape(words)}</h2>"


def paragraph(words: str, *, faint: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{FAINT if faint else ''}>{escape(words)}</p>"


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    best: Collection[int] = (),
    ready: Collection[str] = (),
    long: Collection[str] = (),
) -> str:
    """Return a table with the columns of `tables`, the rows numbered in `best` set off.

    Columns in `ready` are HTML already, those in `long` may be broken into lines.
    """
    head = "".join(f"<th{_class(key, show, long)}>{escape(label)}</th>" for key, label, show in columns)
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(
            f'<td class="bar">{row[key]}</td>'
            if key in ready
            else f"<td{_class(key, show, long)}>{escape(show(row[key]))}</td>"
            for key, _, show in columns
        )
        lines.append(f"<tr{BEST if number in best else ''}>{cells}</tr>")
    return (
        f'<div class="wide"><table{BARS if ready else ""}><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    """Say what colours stand for: (words, number of the colour, whether it is filled)."""
    items = []
    for words, colour, filled in entries:
        fill = f"background:var(--c{colour % COLOURS})" if filled else "background:none"
        items.append(f'<li><i style="border-color:var(--c{colour % COLOURS});{fill}"></i>{escape(words)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def details(summary: str, content: str, *, shown: bool) -> str:
    """A part that can be folded away; `content` is HTML already."""
    return f"<details{' open' if shown else ''}><summary>{escape(summary)}</summary>\n{content}</details>"


def _class(key: str, show: object, long: Collection[str]) -> str:
    names = [*(["text"] if show is text else []), *(["long"] if key in long else [])]
    return f' class="{" ".join(names)}"' if names else ""
