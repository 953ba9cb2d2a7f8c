"""A progress bar on the terminal's error stream, for loops that take seconds; silent everywhere else."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def track(items: Iterable[ItemT], description: str, total: int | None = None) -> Iterator[ItemT]:
    """Pass the items on, with a bar that says how far it is.

    Args:
        items: What to pass on.
        description: Shown before the bar.
        total: Number of items, where known and `len` does not tell.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description, total, console=Console(stderr=True), transient=True)
