"""A report: its outermost section, and how it is written."""

from __future__ import annotations

import os
from pathlib import Path

from masformer.files import make_folder, write_whole
from masformer.reports.document import Section
from masformer.reports.html import page
from masformer.reports.markdown import markdown


class Report(Section):
    """The outermost section.

    >>> from masformer.reports import Code
    >>> report = Report("Perplexity")
    >>> report.section("Books").text("Under ", Code("window:512"), " it is higher.")
    >>> print(report.to_markdown(), end="")
    # Perplexity
    <BLANKLINE>
    ## Books
    <BLANKLINE>
    Under `window:512` it is higher.
    """

    def to_markdown(self, images: str = "") -> str:
        """GitHub's Markdown; pictures are linked as `images` and the name of their file."""
        return markdown(self, images)

    def to_html(self) -> str:
        """A page that needs no other file and no network, and runs no script."""
        return page(self)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes `report.md` with its pictures beside it, and `report.html`.

        Args:
            folder: made where it is missing.

        Returns:
            The files.

        Raises:
            MasformerError: the folder or a file cannot be written.
        """
        folder = make_folder(folder)
        files: dict[str, str | bytes] = {f"{name}.png": figure.png for figure, name in self.file_names().items()}
        files |= {"report.md": self.to_markdown(), "report.html": self.to_html()}
        for name, content in files.items():
            write_whole(folder / name, content)
        return [folder / name for name in files]
