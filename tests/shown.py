"""What a table looks like in a terminal."""

import io

from rich.console import Console


def shown(table):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()
