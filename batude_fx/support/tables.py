"""Tables for the terminal and for `print`: one style, one width. What stands in a table is its owner's business.

rich is imported inside the functions, so that `import batude_fx` stays light.
"""

from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 120


def new_table(*columns: str, title: str = "", min_width: int | None = 64, **style: Any) -> "Table":  # noqa: ANN401
    """An empty table.

    Args:
        *columns: Headings of left-aligned columns; further ones are added with `table.add_column`.
        title: Plain text; brackets in it are no markup.
        min_width: Of the whole table, in characters.
        **style: Further options of `rich.table.Table`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    options: dict[str, Any] = {"box": SIMPLE_HEAD, "caption_justify": "left", "min_width": min_width, **style}
    return Table(*columns, title=escape(title) or None, **options)


def add_row(table: "Table", *cells: str) -> None:
    """Add a row of plain texts; brackets in them are no markup."""
    from rich.markup import escape

    table.add_row(*map(escape, cells))


def set_caption(table: "Table", caption: str) -> None:
    """Put a plain text below the table."""
    from rich.markup import escape

    table.caption = escape(caption)


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> "Table":
    """Names and values in two columns."""
    table = new_table(title=title, min_width=None, show_header=False)
    for name, value in rows:
        add_row(table, name, value)
    return table


def as_text(table: "Table") -> str:
    """The table as plain text, for `print` and log files."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue().rstrip()
