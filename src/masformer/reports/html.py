"""Reports as one HTML page: pictures inside, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby, takewhile

from masformer.reports.document import Code, Figure, Fold, Listing, Paragraph, Section, Table, sections, slug

STYLE = """
:root { --ink: #22303c; --soft: #5c6b73; --line: #d5dbe1; --shade: #f4f6f8; --mark: #33658a; }
* { box-sizing: border-box; }
body { margin: 2.5rem auto; padding: 0 1.5rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3, p { overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; margin: 0 0 1rem; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h4, h5, h6 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
nav ul { columns: 2; margin: 0 0 1.5rem; padding-left: 1.2rem; }
a { color: var(--mark); }
code, pre { font: .88em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--shade); padding: .6rem .8rem; border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.small { color: var(--soft); font-size: .85rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
caption { caption-side: top; text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .3rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--shade); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td { min-width: 6.5rem; }
td.number { min-width: 0; white-space: nowrap; }
td code { white-space: nowrap; }
td code wbr { white-space: normal; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem 2rem; }
figure { margin: .5rem 0; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .85rem; }
@media (min-width: 75rem) { body { max-width: 72rem; } }
@media print {
  body { margin: 0; padding: 0; max-width: none; font-size: 10pt; }
  nav { display: none; }
  h2, h3, h4 { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; }
  thead { display: table-header-group; }
  .table { overflow: visible; }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(report: Section) -> str:
    """The whole page."""
    names = _Names()
    top = [(section.title, names.take(section.title)) for section in sections(report)]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for title, name in top)
    contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if len(top) > 1 else ""
    first = len(list(takewhile(lambda block: isinstance(block, Paragraph), report.blocks)))
    lead, rest = Section("", report.blocks[:first]), Section("", report.blocks[first:])
    before = "\n".join(_blocks(lead, 2, iter(())))
    body = "\n".join(_blocks(rest, 2, iter([name for _, name in top])))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(report.title)}</h1>\n{before}\n{contents}{body}\n</body>\n</html>\n"
    )


class _Names:
    """Names for the target of a link, each given once."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def take(self, title: str) -> str:
        base = slug(title) or "section"
        name, number = base, 1
        while name in self.taken:
            number += 1
            name = f"{base}-{number}"
        self.taken.add(name)
        return name


def _blocks(section: Section, level: int, names: Iterator[str]) -> Iterator[str]:
    """What stands below a heading; `names` are for the headings directly below the report."""
    for drawn, blocks in groupby(section.blocks, lambda block: isinstance(block, Figure)):
        if drawn:
            pictures = "".join(_figure(block) for block in blocks if isinstance(block, Figure))
            yield f'<div class="figures">{pictures}</div>'
        else:
            yield from _others(blocks, level, names)


def _others(blocks: Iterable[object], level: int, names: Iterator[str]) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, Fold):
            yield f"<details><summary>{escape(block.title)}</summary>"
            yield from _blocks(block, level, names)
            yield "</details>"
        elif isinstance(block, Section):
            name = f' id="{next(names)}"' if level == 2 else ""
            tag = f"h{min(level, 6)}"
            yield f"<section{name}>\n<{tag}>{escape(block.title)}</{tag}>"
            yield from _blocks(block, level + 1, names)
            yield "</section>"
        elif isinstance(block, Paragraph):
            yield f"<p{_small(block.small)}>{''.join(map(_inline, block.parts))}</p>"
        elif isinstance(block, Listing):
            yield f"<pre>{escape(block.text)}</pre>"
        elif isinstance(block, Table):
            yield _table(block)


def _figure(figure: Figure) -> str:
    source = base64.b64encode(figure.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{escape(figure.caption)}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    kinds = [' class="number"' if numeric else "" for numeric in table.numeric]
    head = "".join(
        f'<th scope="col"{kind}>{_inline(title)}</th>' for kind, title in zip(kinds, table.columns, strict=True)
    )
    rows = "\n".join(
        f"<tr>{''.join(f'<td{kind}>{_cell(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    note = f'\n<p class="small">{escape(table.note)}</p>' if table.note else ""
    body = f"{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    return f'<div class="table"><table>{body}</table></div>{note}'


def _cell(text: str) -> str:
    """A plan in a table breaks between its parts alone."""
    return re.sub(r"[,;] ?", r"\g<0><wbr>", _inline(text)) if isinstance(text, Code) else _inline(text)


def _inline(text: str) -> str:
    return f"<code>{escape(text)}</code>" if isinstance(text, Code) else escape(text)


def _small(small: bool) -> str:
    return ' class="small"' if small else ""
