"""Recipes: how they are read and changed, that the shipped ones are documents, and that every setting is explained."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from batude_fx import Budget, Recipe, RecipeError
from batude_fx.training.duration import Duration
from batude_fx.training.recipe import shipped
from batude_fx_cli.app import app
from tests.training.recipe_text import GOOD, recipe_file


def test_a_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(recipe_file(tmp_path, GOOD))
    assert recipe.budget == Budget(flops="2.5x")
    assert recipe.one_shot.epochs == Duration(3, "epochs")
    assert recipe.one_shot.interval == Duration(50, "%")
    assert recipe.finalize.epochs == Duration(500, "steps")
    assert (recipe.data.batch_size, recipe.seed, recipe.pretrain) == (128, 0, None)


def test_the_command_line_takes_precedence(tmp_path: Path) -> None:
    settings = ["one_shot.epochs=2", "budget.flops=0.4", "model.args.num_classes=7", "data.scale=[0.5, 1]"]
    text = GOOD.replace("budget: 2.5x", "budget: {flops: 2.5x}")
    recipe = Recipe.from_yaml(recipe_file(tmp_path, text), settings)
    assert recipe.one_shot.epochs == Duration(2, "epochs")
    assert recipe.budget == Budget(flops=0.4)
    assert recipe.model.args == {"num_classes": 7}
    assert recipe.data.scale == (0.5, 1)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(recipe_file(tmp_path, GOOD), ["pretrain.epochs=1", "model.args.num_classes=7"])
    again = Recipe.from_yaml(recipe_file(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_documents(name: str) -> None:
    text = shipped()[name].read_text(encoding="utf-8")
    header = text[: text.index("\nmodel:")]
    assert all(line.startswith("# ") or line == "#" for line in header.splitlines())
    assert all(f"# {word}:" in header for word in ("Command", "Measured"))
    assert "@" not in header
    recipe = Recipe.from_yaml(name)
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", shipped())
def test_a_phase_can_be_left_out_of_every_shipped_recipe(name: str) -> None:
    recipe = Recipe.from_yaml(name, ["finalize.epochs=0"])
    assert recipe.finalize.epochs.amount == 0


def test_a_date_as_a_path_is_read_as_text(tmp_path: Path) -> None:
    for name in ("2024-01-15", "2024-02-30"):
        assert Recipe.from_yaml(recipe_file(tmp_path, GOOD), [f"data.root={name}"]).data.root == Path(name)


def test_a_missing_file_names_close_recipes() -> None:
    with pytest.raises(RecipeError, match=r"resnet20-cifar10: no such file.*resnet20-cifar10-2.5x"):
        Recipe.from_yaml("resnet20-cifar10")


@pytest.mark.parametrize("source", ["my.yaml", Path("nowhere") / "my"])
def test_a_missing_path_names_no_recipes(source: str | Path) -> None:
    with pytest.raises(RecipeError, match=rf"^{source}: there is no such recipe file\."):
        Recipe.from_yaml(source)


@pytest.mark.parametrize(("setting", "words"), [
    ("one_shot.epochs", "expected KEY=VALUE"),
    ("one_shot.epocs=3", "--set one_shot.epocs=3: one_shot.epocs: unknown key; expected epochs"),
    ("one_shot.min_lr=2", r"my\.yaml:6, --set one_shot\.min_lr=2: one_shot: min_lr 2 is above lr 0\.05"),
    ("one_shot.warmup=150%", r"my\.yaml:6, --set one_shot\.warmup=150%: one_shot: a warmup of 150%"),
    ("budget=[", "the value is not YAML"),
    ("budget=2", r"--set budget=2: budget: .*inside \(0, 1\)"),
    ("budget.params=0.9", r"--set budget.params=0.9: budget is '2.5x', which has no params; expected the whole of it"),
])  # fmt: skip
def test_a_wrong_setting_is_quoted(setting: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_yaml(recipe_file(tmp_path, GOOD), [setting])


def test_the_schema_explains_every_setting() -> None:
    result = CliRunner().invoke(app, ["recipes", "schema"])
    schema = json.loads(result.stdout)
    assert {"type": "string"} in schema["properties"]["budget"]["anyOf"]
    sections = [schema, *(one for name, one in schema["$defs"].items() if name != "Budget")]  # described as a whole
    fields = [field for section in sections for field in section.get("properties", {}).values()]
    assert len(fields) > 50
    assert all("description" in field for field in fields)
