"""`masformer report`."""

from __future__ import annotations

from pathlib import Path

from masformer.cli.options import say
from masformer.errors import MasformerError
from masformer.extras import need
from masformer.files import make_folder


def report(
    folder: str,
    out: str | None = None,
    title: str | None = None,
    into: str | None = None,
    check: bool = False,
) -> None:
    """Makes tables and drawings of the records that commands wrote with --json: report.md and report.html.

    Args:
        folder: the records are all .json files in it and below.
        out: folder for the report (default: FOLDER/report).
        title: of the report (default: what was measured, on which models).
        into: in place of a report, a Markdown file whose tables of figures are made again; docs/evaluation.md says how
            they are marked.
        check: write nothing, and fail with exit code 1 where the tables of --into differ from the records.

    Example:
        masformer report benchmarks/results --out report
    """
    from masformer import records, reports

    if check and into is None:
        raise MasformerError("--check needs --into FILE, the file that is checked")
    if into is not None:
        if out is not None or title is not None:
            raise MasformerError("--out and --title are of a report; they do nothing with --into")
        changed = reports.update_tables(into, folder, check=check)
        say(f"{into}: tables {'written' if changed else 'are up to date'}")
        return
    need("plots", "masformer report")
    target = Path(folder) / "report" if out is None else Path(out)
    found, others = records.read_records(folder, without=[target])
    make_folder(target)  # before the work
    made = reports.build_report(found, title or reports.title_of(found), others)
    files = made.write(target)
    if others:
        say(f"no records, left out: {reports.listed(list(map(str, others)))}")
    pages = ", ".join(str(file) for file in files if file.suffix != ".png")
    drawn = sum(file.suffix == ".png" for file in files)
    records_read, drawings = (
        f"{count} {what}{'s' * (count != 1)}" for count, what in ((len(found), "record"), (drawn, "drawing"))
    )
    say(f"{records_read}: {pages}; {drawings}")
