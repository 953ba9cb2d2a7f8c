"""The output of all commands: results as tables or JSON, errors and warnings on one line of the error stream."""

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
_INTERRUPTED = 130  # the exit code that shells give to a command that Ctrl-C has ended: 128 + SIGINT


def one_line_errors(command: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
    """Decorate a command so that an expected error ends it with one line and exit code 1, not with a traceback.

    After Ctrl-C the exit code is 130.
    """

    @wraps(command)
    def run(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        from batude_fx.errors import BatudeError, RecipeError  # the command imports the package, too

        try:
            with warnings.catch_warnings():
                warnings.showwarning = _one_line_warning  # type: ignore[assignment]
                return command(*args, **kwargs)
        except BatudeError as error:
            first, *more = str(error).splitlines() if isinstance(error, RecipeError) else [str(error)]
            for line in (f"error: {first}", *more):  # a recipe may have several problems, one per line
                print_to_stderr(line, "red")
            raise typer.Exit(_INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else 1) from None
        except KeyboardInterrupt:
            print_to_stderr("error: interrupted.", "red")
            raise typer.Exit(_INTERRUPTED) from None
        except BrokenPipeError:  # the reader of the output has ended, as `head` does; click exits quietly
            raise
        except OSError as error:
            if error.strerror is None:  # raised by a library, not by the system
                raise
            print_to_stderr(
                f"error: {error.filename or 'the output'} cannot be written or read: {error.strerror}.", "red"
            )
            raise typer.Exit(1) from None

    return run


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        print_to_stderr(f"warning: {message}", "yellow")


def print_to_stderr(text: str, colour: str = "") -> None:
    """Print text on the error stream, as one line."""
    line = " ".join(text.split())
    console = Console(stderr=True, soft_wrap=True, emoji=False)
    console.print(line, style=colour, markup=False, highlight=False)


def print_line(text: str) -> None:
    """Print a line on the standard output, without wrapping or markup."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def show(table: Any, facts: Any, as_json: bool) -> None:  # noqa: ANN401, FBT001
    """Print a table, or the facts as JSON in its place."""
    if as_json:
        json.dump(facts, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        Console().print(table)
