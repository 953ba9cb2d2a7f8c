"""`python -m batude_fx` is `batude-fx`."""

from batude_fx_cli.app import app

app(prog_name="batude-fx")
