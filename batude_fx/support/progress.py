"""Progress bars on the terminal's error stream, for loops that take seconds; and the lines that training prints."""

import sys
from collections.abc import Generator, Iterable
from typing import Self, TypeVar

ItemT = TypeVar("ItemT")


def track(items: Iterable[ItemT], description: str, total: int | None = None) -> Generator[ItemT, None, None]:
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
    from rich.progress import Progress

    # What others print, and is caught elsewhere, must not be shown above the bar.
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        yield from progress.track(items, total, description=description)


class Bar:
    """A bar that stays at the bottom while lines go past above it; off a terminal there are the lines alone.

    Args:
        description: Shown before the bar.
        total: Number of steps.
        done: How many of them are done already.
        shown: False in all processes but one.
    """

    def __init__(self, description: str, total: int, done: int = 0, *, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        console = Console(stderr=True, quiet=not shown, soft_wrap=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(description, total=total, completed=done)

    def advance(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take it away."""
        self._progress.stop()
