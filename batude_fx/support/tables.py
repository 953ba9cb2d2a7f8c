"""The style of all tables, on the terminal and as plain text. What a table shows is decided where it is filled.

rich is imported inside the functions, so that `import batude_fx` stays light.
"""

from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING, Any

from batude_fx.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 120


def new_table(*columns: str, title: str = "", min_width: int | None = 64, **style: Any) -> "Table":  # noqa: ANN401
    """Return an empty table.

    Args:
        *columns: Headings of left-aligned columns; `table.add_column` adds others.
        title: Plain text, in which brackets are not markup.
        min_width: Least width of the table in characters.
        **style: Further options of `rich.table.Table`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    options: dict[str, Any] = {"box": SIMPLE_HEAD, "caption_justify": "left", "min_width": min_width, **style}
    return Table(*columns, title=escape(printable(title)) or None, **options)


def add_row(table: "Table", *cells: str) -> None:
    """Add a row of plain text, in which brackets are not markup."""
    from rich.markup import escape

    table.add_row(*(escape(printable(cell)) for cell in cells))


def set_caption(table: "Table", caption: str) -> None:
    """Put plain text, in which brackets are not markup, below a table."""
    from rich.markup import escape

    table.caption = escape(printable(caption))


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> "Table":
    """Return a table of two columns, names and values."""
    table = new_table(title=title, min_width=None, show_header=False)
    for name, value in rows:
        add_row(table, name, value)
    return table


class ShowsTable:
    """What prints as a table, and is shown as one by notebooks."""

    def _table(self) -> "Table":
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the table as text, 120 characters wide."""
        return as_text(self._table())

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=_WIDTH, record=True)
        console.print(self._table())
        return console.export_html(inline_styles=True, code_format='<pre style="line-height: 1.2">{code}</pre>')


def as_text(table: "Table") -> str:
    """Return a table as plain text, for `print` and log files."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue().rstrip()
