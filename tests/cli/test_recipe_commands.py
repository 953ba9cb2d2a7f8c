"""`batude-fx recipes` lists, shows and validates."""

import json

import yaml
from typer.testing import CliRunner

from batude_fx.training.recipe import shipped
from batude_fx_cli.app import app


def test_recipes_can_be_listed_shown_and_validated() -> None:
    listed = CliRunner().invoke(app, ["recipes", "list", "--json"])
    assert json.loads(listed.stdout)["digits-demo"] == {"model": "test_resnet", "budget": "flops 2.5x"}
    shown = CliRunner().invoke(app, ["recipes", "show", "digits-demo"])
    assert shown.stdout == shipped()["digits-demo"].read_text(encoding="utf-8")
    resolved = CliRunner().invoke(app, ["recipes", "show", "digits-demo", "--set", "seed=5"])
    assert yaml.safe_load(resolved.stdout)["seed"] == 5
    assert CliRunner().invoke(app, ["recipes", "validate", "digits-demo"]).stdout == "digits-demo: valid\n"
