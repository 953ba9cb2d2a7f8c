"""What the tests of tables read: the text of a table of rich, and its cells."""

from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table


def text_of(table: Table, width: int = 80) -> str:
    """Return a table as it is printed on a terminal of this width."""
    file = StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


def rows_of(table: Table) -> list[dict[str, Any]]:
    """Return every row by the names of the columns; the last column has none."""
    cells = zip(*(column.cells for column in table.columns), strict=True)
    return [dict(zip([str(column.header) for column in table.columns], row, strict=True)) for row in cells]
