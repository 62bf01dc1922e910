"""Reports of what was measured: from the records that commands write with --json to tables and drawings.

`document` has its sections, text, tables and figures, `markdown` and `html` write them, `report` is the whole; `values`
and `rows` turn a record's figures into tables, `figures` into drawings; `kinds` says what is shown of each command,
`build` puts it together; `markers` keeps the tables of a text file up to date.
"""

from masformer.reports.build import add_kind, add_record, build_report, listed, title_of
from masformer.reports.document import Code, Section, Table
from masformer.reports.markers import OutOfDateError, update_tables
from masformer.reports.report import Report

__all__ = [
    "Code",
    "OutOfDateError",
    "Report",
    "Section",
    "Table",
    "add_kind",
    "add_record",
    "build_report",
    "listed",
    "title_of",
    "update_tables",
]
