"""Progress bars on the error stream, shown only where it is a terminal; and the lines that training prints."""

import sys
from collections.abc import Generator, Iterable
from typing import Self, TypeVar

ItemT = TypeVar("ItemT")


class _Shown:
    """How many bars are shown now; inside of one, `track` shows none."""

    bars = 0


def track(items: Iterable[ItemT], description: str, total: int | None = None) -> Generator[ItemT, None, None]:
    """Yield the items of an iterable while a progress bar shows how many are done.

    Args:
        items: Any iterable.
        description: Text before the bar.
        total: Number of items, for an iterable without `len`; None if unknown.
    """
    if not sys.stderr.isatty() or _Shown.bars:
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    # rich would print the standard output above the bar, even where the caller redirects it elsewhere.
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        yield from progress.track(items, total, description=description)


def print_line(text: str) -> None:
    """Print a line on the error stream."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


class Bar:
    """A progress bar below the lines that are printed meanwhile; without a terminal, only the lines are printed.

    Args:
        description: Text before the bar.
        total: Number of steps.
        done: Number of steps that are done already.
        visible: Whether this process prints anything; of several processes, only one should.
        prints: Whether lines are printed, too.

    Attributes:
        done: Number of steps that are done.
    """

    def __init__(
        self, description: str, total: int, done: int = 0, *, visible: bool = True, prints: bool = True
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        console = Console(stderr=True, quiet=not visible, soft_wrap=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.done, self._prints = done, prints
        self._task = self._progress.add_task(description, total=total, completed=done)

    def advance(self) -> None:
        """Count one more step as done."""
        self.done += 1
        self._progress.advance(self._task)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._prints:
            self._progress.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        """Show the bar."""
        _Shown.bars += 1
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        _Shown.bars -= 1
        self._progress.stop()
