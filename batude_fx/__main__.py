"""Run the command line by `python -m batude_fx`, as `batude-fx` does."""

from batude_fx_cli.app import app

app(prog_name="batude-fx")
