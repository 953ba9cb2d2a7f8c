"""What all commands share: errors and warnings in one line, results as tables or as JSON."""

import json
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


def one_line_errors(command: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
    """A user's mistake ends in one line and exit code 1, not in a traceback."""

    @wraps(command)
    def run(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        from batude_fx.errors import BatudeError, RecipeError  # the command imports the package, too

        try:
            with warnings.catch_warnings():
                warnings.showwarning = _one_line_warning  # type: ignore[assignment]
                return command(*args, **kwargs)
        except BatudeError as error:
            first, *more = str(error).splitlines() if isinstance(error, RecipeError) else [str(error)]
            for line in (f"error: {first}", *more):  # a recipe may have several
                say(line, "red")
            raise typer.Exit(1) from None
        except BrokenPipeError:  # who reads the output has seen enough
            raise
        except OSError as error:
            if error.strerror is None:  # some library's, not the system's
                raise
            say(f"error: {error.filename or 'the output'} cannot be written or read: {error.strerror}.", "red")
            raise typer.Exit(1) from None

    return run


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        say(f"warning: {message}", "yellow")


def say(text: str, colour: str = "") -> None:
    """A line on the error stream."""
    line = " ".join(text.split())
    console = Console(stderr=True, soft_wrap=True, emoji=False)
    console.print(line, style=colour, markup=False, highlight=False)


def print_line(text: str) -> None:
    """A line on the standard output, whole and as it is."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def show(table: Any, facts: Any, as_json: bool) -> None:  # noqa: ANN401, FBT001
    """The table for people, or the facts for machines and nothing else."""
    if as_json:
        json.dump(facts, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        Console().print(table)
