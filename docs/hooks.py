"""For the site alone: the README is its home page, and links to other files of the repository stay alive.

A link out of docs/ to a file is turned to a copy of that file in the site; one to a folder becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
COPIES = "files"


def on_files(files: Files, config: Any) -> Files:
    """Adds the home page, and the files that pages point to."""
    files.append(
        File.generated(
            config, "index.md", content=_turned((ROOT / "README.md").read_text(), "README.md", files, config)
        )
    )
    for file in list(files.documentation_pages()):
        if file.src_uri != "index.md":
            _turned(file.content_string, f"docs/{file.src_uri}", files, config)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with its links turned."""
    return (
        markdown if page.file.src_uri == "index.md" else _turned(markdown, f"docs/{page.file.src_uri}", files, config)
    )


def _turned(text: str, path: str, files: Files, config: Any) -> str:
    """Links of a page that stands at `path` in the repository."""
    page = "index.md" if path == "README.md" else path.removeprefix("docs/")

    def turn(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        place, hash_, anchor = target.partition("#")
        if not place or "://" in place or place.startswith("mailto:"):
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(path), place))
        if there == "README.md":
            goal = "index.md"
        elif there.startswith("docs/"):
            goal = there.removeprefix("docs/")
        elif (ROOT / there).is_dir():
            return words
        elif (ROOT / there).is_file():
            goal = f"{COPIES}/{there.removesuffix('.md')}" + (".txt" if there.endswith(".md") else "")
            if files.get_file_from_path(goal) is None:
                files.append(File.generated(config, goal, abs_src_path=str(ROOT / there)))
        else:
            return match[0]  # which mkdocs reports
        if (ROOT / "docs" / goal).is_dir():
            return words
        return f"{mark}[{words}]({posixpath.relpath(goal, posixpath.dirname(page) or '.')}{hash_}{anchor})"

    return LINK.sub(turn, text)
