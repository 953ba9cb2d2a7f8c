"""`python -m batude_fx` is `batude-fx`."""

from batude_fx.cli import app

app(prog_name="batude-fx")
