"""What a report is made of: sections of text, tables and figures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

DPI = 120


class Code(str):
    """Text that is shown as code: a plan, a file, an option."""

    __slots__ = ()


@dataclass(frozen=True)
class Paragraph:
    """Text.

    Attributes:
        parts: plain text, and `Code`.
        small: a note rather than something to read first.
    """

    parts: tuple[str, ...]
    small: bool = False


@dataclass(frozen=True)
class Listing:
    """Lines shown as they are, for example a command."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: their titles.
        rows: cells in the order of the columns; `Code` where it is one.
        numeric: for each column, whether it holds numbers.
        title: shown above; may be empty.
        note: shown below; may be empty.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: of its file, without the suffix.
        png: its bytes.
        caption: shown below it.
    """

    name: str
    png: bytes
    caption: str


@dataclass
class Section:
    """A heading and what stands below it, in the order in which it was added.

    Attributes:
        title: plain text.
        blocks: paragraphs, listings, tables, figures, and sections below this one.
    """

    title: str
    blocks: list[Paragraph | Listing | Table | Figure | Section] = field(default_factory=list)

    def text(self, *parts: str, small: bool = False) -> None:
        """Adds a paragraph of plain text and `Code`."""
        self.blocks.append(Paragraph(parts, small))

    def code(self, text: str) -> None:
        """Adds lines that are shown as they are."""
        self.blocks.append(Listing(text))

    def table(self, table: Table) -> None:
        """Adds a table."""
        self.blocks.append(table)

    def figure(self, name: str, drawing: Drawing, caption: str) -> None:
        """Adds a drawing of matplotlib; its file has the `name` as `slug` has it."""
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        self.blocks.append(Figure(slug(name), buffer.getvalue(), caption))

    def fold(self, title: str) -> Fold:
        """Adds what is read last, and returns it: a page shows its title alone until it is asked for."""
        made = Fold(title)
        self.blocks.append(made)
        return made

    def section(self, title: str) -> Section:
        """Adds a section below this one, and returns it."""
        made = Section(title)
        self.blocks.append(made)
        return made

    def figures(self) -> Iterator[Figure]:
        """All figures, those of the sections below too."""
        for block in self.blocks:
            if isinstance(block, Figure):
                yield block
            elif isinstance(block, Section):
                yield from block.figures()

    def file_names(self) -> dict[Figure, str]:
        """Names of the files of all figures, without the suffix; of two with one name, the second gets a number."""
        found: dict[Figure, str] = {}
        for figure in self.figures():
            name, number = figure.name, 1
            while figure not in found and name in found.values():
                number += 1
                name = f"{figure.name}-{number}"
            found.setdefault(figure, name)
        return found

    def tables(self) -> Iterator[Table]:
        """All tables, those of the sections below too."""
        for block in self.blocks:
            if isinstance(block, Table):
                yield block
            elif isinstance(block, Section):
                yield from block.tables()


class Fold(Section):
    """What is read last: settings, and how something was made."""


def slug(text: str) -> str:
    """`eval perplexity, books` -> `eval-perplexity-books`."""
    return "-".join("".join(sign if sign.isascii() and sign.isalnum() else " " for sign in text.lower()).split())


def sections(section: Section) -> Sequence[Section]:
    """The sections directly below one."""
    return [block for block in section.blocks if isinstance(block, Section) and not isinstance(block, Fold)]
