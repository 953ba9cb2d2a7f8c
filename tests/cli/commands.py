"""Ways to run a command: for its result, for the JSON that it prints, and for its one line of error."""

import json
from typing import Any

from typer.testing import CliRunner, Result

from batude_fx_cli.app import app

NAME = "resnet10t"


def run(*arguments: object) -> Result:
    """Run a command."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    """Run a command with --json, check that it succeeds, and return what it prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def run_error(*arguments: object) -> str:
    """Run a command, check that it fails with one line of error and prints nothing else, and return the line."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
