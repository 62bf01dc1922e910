"""Reports as GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from masformer.reports.document import Code, Figure, Fold, Listing, Paragraph, Section, Table


def markdown(report: Section, images: str = "") -> str:
    """A section and all below it; pictures are linked as `images` and their file name."""
    files = {figure: f"{images}{name}.png" for figure, name in report.file_names().items()}
    return "\n\n".join(_blocks(report, 1, files)) + "\n"


def _blocks(section: Section, level: int, files: Mapping[Figure, str]) -> Iterator[str]:
    if isinstance(section, Fold):
        yield _guarded(f"{_inline(section.title)}:")
    else:
        yield f"{'#' * min(level, 6)} {_inline(section.title)}"
    for block in section.blocks:
        if isinstance(block, Section):
            yield from _blocks(block, level + 1, files)
        elif isinstance(block, Paragraph):
            yield _guarded("".join(map(_inline, block.parts)).strip())
        elif isinstance(block, Listing):
            fence = "`" * max(3, 1 + _longest_run(block.text))
            yield f"{fence}\n{block.text}\n{fence}"
        elif isinstance(block, Figure):
            caption = re.sub(r"(?<!\\)([\[\]])", r"\\\1", _inline(block.caption))
            yield f"![{caption}]({files[block]})"
        else:
            title = f"**{_inline(block.title)}**" if block.title else ""
            parts = [title, markdown_table(block), _guarded(_inline(block.note))]
            yield "\n\n".join(part for part in parts if part)


def markdown_table(table: Table) -> str:
    """The columns and rows alone, without a line break at the end."""
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [[_cell(title) for title in table.columns], rule, *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    # In a table a bar ends a cell even inside of code; GitHub takes the backslash away there too.
    return re.sub(r"(?<!\\)\|", r"\\|", _inline(text)) if isinstance(text, Code) else _inline(text)


def _inline(text: str) -> str:
    """Plain text with what Markdown would read as its own marked; or a code span."""
    flat = " ".join(text.split()) if isinstance(text, Code) else re.sub(r"\s*\n\s*", " ", text)
    if isinstance(text, Code):
        fence = "`" * (1 + _longest_run(flat))
        room = " " if flat.startswith("`") or flat.endswith("`") else ""
        return f"{fence}{room}{flat}{room}{fence}"
    flat = re.sub(r"([\\`*<>|~$])", r"\\\1", flat)
    flat = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", flat)
    flat = re.sub(r"\](?=[(\[:])", r"\\]", flat)
    return re.sub(r"&(?=#?\w+;)", r"\\&", flat)


def _guarded(text: str) -> str:
    """Text whose beginning Markdown does not take for a heading or a list."""
    return re.sub(r"^(#|[-+]\s|=+$|-+$|\d+(?=[.)]\s))", lambda match: _mark(match[0]), text)


def _mark(start: str) -> str:
    return f"{start}\\" if start[0].isdigit() else f"\\{start}"


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
