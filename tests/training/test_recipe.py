"""Recipes: what can be said, and what is answered to twelve and more ways of saying it wrongly."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from batude_fx import Budget, Recipe, RecipeError
from batude_fx.training.duration import Duration
from batude_fx.training.recipe import shipped
from batude_fx_cli.app import app

GOOD = """\
model:
  name: resnet10t
data:
  root: photos
budget: 2.5x
one_shot:
  epochs: 3
  interval: 50%
finalize:
  epochs: 500 steps
"""


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(_file(tmp_path, GOOD))
    assert recipe.budget == Budget(flops="2.5x")
    assert recipe.one_shot.epochs == Duration(3, "epochs")
    assert recipe.one_shot.interval == Duration(50, "%")
    assert recipe.finalize.epochs == Duration(500, "steps")
    assert (recipe.data.batch_size, recipe.seed, recipe.pretrain) == (128, 0, None)


def test_the_command_line_takes_precedence(tmp_path: Path) -> None:
    settings = ["one_shot.epochs=2", "budget.flops=0.4", "model.args.num_classes=7", "data.scale=[0.5, 1]"]
    text = GOOD.replace("budget: 2.5x", "budget: {flops: 2.5x}")
    recipe = Recipe.from_yaml(_file(tmp_path, text), settings)
    assert recipe.one_shot.epochs == Duration(2, "epochs")
    assert recipe.budget == Budget(flops=0.4)
    assert recipe.model.args == {"num_classes": 7}
    assert recipe.data.scale == (0.5, 1)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(_file(tmp_path, GOOD), ["pretrain.epochs=1", "model.args.num_classes=7"])
    again = Recipe.from_yaml(_file(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


@given(st.integers(0, 10**12))
def test_durations_are_written_in_full(amount: int) -> None:
    recipe = Recipe.model_validate(yaml.safe_load(GOOD))
    phase = recipe.finalize.model_copy(update={"epochs": Duration(amount, "steps")})
    long = recipe.model_copy(update={"finalize": phase})
    assert Recipe.model_validate(yaml.safe_load(long.to_yaml())) == long


@given(st.floats(0, 1000), st.integers(1, 500), st.integers(0, 10**5))
def test_durations_are_shares_of_something(amount: float, per_epoch: int, phase: int) -> None:
    assert Duration(amount, "epochs").steps(per_epoch) == round(amount * per_epoch)
    assert Duration(amount, "steps").steps(per_epoch, phase) == round(amount)
    assert Duration(amount, "%").steps(per_epoch, phase) == round(amount * phase / 100)


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


# What is broken, the text to put in place of which, the line and key of the answer, and words of it.
BROKEN = {
    "unknown key": ("  interval: 50%", "  intervall: 50%", 8, "one_shot.intervall", "unknown key; expected interval"),
    "wrong type": ("  root: photos", "  root: photos\n  batch_size: [8]", 5, "data.batch_size", "valid integer"),
    "negative epochs": ("  epochs: 3", "  epochs: -3", 7, "one_shot.epochs", '3, "3 epochs" or "500 steps"'),
    "unknown model": ("resnet10t", "resnet10x", 2, "model.name", "Close names: resnet10t"),
    "unknown optimizer": ("  epochs: 3", "  epochs: 3\n  optimizer: adamv", 8, "one_shot.optimizer", "names: adam,"),
    "budget out of reach": ("2.5x", "1000x", 5, "budget", "Use at least 0."),
    "YAML tag": ("resnet10t", "!!python/name:os.system", 2, "model.name", "tag"),
    "duplicate key": ("  interval: 50%", "  epochs: 4", 8, "one_shot.epochs", "duplicate key, first on line 7"),
    "empty file": (GOOD, "", 1, "", "expected the sections model, data, budget"),
    "epochs as text": ("  epochs: 3", "  epochs: three", 7, "one_shot.epochs", "'three' is no length of training"),
    "two budgets in conflict": ("2.5x", "{flops: 0.9, params: 0.001}", 5, "budget", "0.0010 of the params is out of"),
    "an alias": ("  name: resnet10t", "  name: &a resnet10t\n  checkpoint: *a", 3, "", "aliases"),
    "no YAML": ("  root: photos", "  root: [photos", 5, "", "no YAML"),
    "missing section": ("budget: 2.5x\n", "", 1, "budget", "missing"),
    "rho falls": ("  epochs: 3", "  epochs: 3\n  rho: [1, 0.1]", 6, "one_shot", "rho falls from 1 to 0.1"),
    "unknown argument": ("resnet10t", "resnet10t\n  args: {foo: 1}", 1, "model", "foo"),
    "missing checkpoint": ("resnet10t", "resnet10t\n  checkpoint: a.bin", 1, "model", "'a.bin' does not exist"),
    "weights among arguments": (
        "resnet10t", "resnet10t\n  args: {checkpoint_path: evil.pth}", 1, "model", "weights by 'checkpoint_path'"
    ),
    "a scheduler of epochs": ("  epochs: 3", "  epochs: 3\n  scheduler: step", 8, "one_shot.scheduler", "cosine, tanh"),
    "an interval of nothing": ("interval: 50%", "interval: 0", 8, "one_shot.interval", "0 epochs is no interval"),
    "a teacher without a network": (
        "one_shot:", "pretrain: {epochs: 1, distillation: {}}\none_shot:", 6, "pretrain.distillation", "unknown key"
    ),
    "a dataset of no kind": (
        "  root: photos", "  name: torchvision/cifar10", 4, "data.name", "begin with torch/, hfds/"
    ),
    "a folder by another name": ("  root: photos", "  name: torch/folder", 4, "data.name", "empty for a folder"),
    "an argument's value": ("resnet10t", "resnet10t\n  args: {global_pool: foo}", 1, "model", "cannot be built"),
    "an argument's unknown name": ("resnet10t", "resnet10t\n  args: {act_layer: foo}", 1, "model", "cannot be built"),
    "an argument that is a list": (
        "resnet10t", "resnet10t\n  args: {layers: [1]}", 3, "model.args.layers", "true, false, a number, text or null"
    ),
    "a range in percent": ("  root: photos", "  root: photos\n  scale: [35, 100]", 5, "data.scale", "first, up to 1"),
    "a range that falls": ("  root: photos", "  root: photos\n  ratio: [2, 1]", 5, "data.ratio", "smaller end first"),
    "part of a folder": (
        "  root: photos", "  root: photos\n  val_split: train[90%:]", 5, "data.val_split", "no split of a folder"
    ),
    "a word torchvision lacks": (
        "  root: photos", "  name: torch/mnist\n  train_split: tarin", 5, "data.train_split", "use one of train, tr"
    ),
    "a rate that rises": ("  epochs: 3", "  epochs: 3\n  min_lr: 2", 6, "one_shot", "min_lr 2 is above lr 0.05"),
    "a warmup beyond the end": ("  epochs: 3", "  epochs: 3\n  warmup: 150%", 6, "one_shot", "longer than its phase"),
    "a warmup of more epochs": (
        "  epochs: 3", "  epochs: 3\n  warmup: 4 epochs", 6, "one_shot", "4 epochs is longer than its phase, 3 ep"
    ),
    "another case": ("  epochs: 3", "  epochs: 3\n  optimizer: AdamW", 8, "one_shot.optimizer", "Close names: adamw"),
    "a teacher that knows nothing": (
        GOOD,
        GOOD.replace("resnet10t", "resnet10t\n  pretrained: true\n  args: {num_classes: 7}")
            .replace("  epochs: 3", "  epochs: 3\n  distillation: {}"),
        1, "pretrain", "the head for 7 classes starts untrained, as the published one has 1000",
    ),
    "no classifier": ("resnet10t", "torchvision:raft_small", 2, "model.name", "classifier"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_answered_in_one_line(name: str, tmp_path: Path) -> None:
    old, new, line, key, words = BROKEN[name]
    assert old in GOOD
    path = _file(tmp_path, GOOD.replace(old, new, 1))
    result = CliRunner().invoke(app, ["recipes", "validate", str(path)])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{path}:{line}: {key}")
    assert words in result.stderr


def test_every_mistake_has_a_line(tmp_path: Path) -> None:
    path = _file(
        tmp_path, GOOD.replace("  epochs: 3", "  epochs: three").replace("  interval: 50%", "  intervall: 50%")
    )
    result = CliRunner().invoke(app, ["recipes", "validate", str(path)])
    assert [line.split(": ")[0] for line in sorted(result.stderr.splitlines())] == [f"{path}:7", f"{path}:8"]


def test_train_gives_every_mistake_a_line_too(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD.replace("  epochs: 3", "  epochs: three\n  lr: 0"))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 1
    lines = sorted(line.removeprefix("error: ") for line in result.stderr.splitlines())
    assert [line.split(": ")[0] for line in lines] == [f"{path}:7", f"{path}:8"]


def test_a_date_is_a_name(tmp_path: Path) -> None:
    for name in ("2024-01-15", "2024-02-30"):
        assert Recipe.from_yaml(_file(tmp_path, GOOD), [f"data.root={name}"]).data.root == Path(name)


def test_a_missing_file_names_close_recipes() -> None:
    with pytest.raises(RecipeError, match=r"resnet20-cifar10: no such file.*resnet20-cifar10-2.5x"):
        Recipe.from_yaml("resnet20-cifar10")


@pytest.mark.parametrize(("setting", "words"), [
    ("one_shot.epochs", "expected KEY=VALUE"),
    ("one_shot.epocs=3", "--set one_shot.epocs=3: one_shot.epocs: unknown key; expected epochs"),
    ("budget=[", "the value is no YAML"),
    ("budget=2", r"--set budget=2: budget: .*inside \(0, 1\)"),
    ("budget.params=0.9", r"--set budget.params=0.9: budget is '2.5x', which has no params; expected the whole of it"),
])  # fmt: skip
def test_a_wrong_setting_is_quoted(setting: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_yaml(_file(tmp_path, GOOD), [setting])


def test_the_schema_explains_every_setting() -> None:
    result = CliRunner().invoke(app, ["recipes", "schema"])
    schema = json.loads(result.stdout)
    assert {"type": "string"} in schema["properties"]["budget"]["anyOf"]
    sections = [schema, *(one for name, one in schema["$defs"].items() if name != "Budget")]  # described as a whole
    fields = [field for section in sections for field in section.get("properties", {}).values()]
    assert len(fields) > 50
    assert all("description" in field for field in fields)


def test_list_show_and_validate() -> None:
    listed = CliRunner().invoke(app, ["recipes", "list", "--json"])
    assert json.loads(listed.stdout)["digits-demo"] == {"model": "test_resnet", "budget": "flops 2.5x"}
    shown = CliRunner().invoke(app, ["recipes", "show", "digits-demo"])
    assert shown.stdout == shipped()["digits-demo"].read_text(encoding="utf-8")
    resolved = CliRunner().invoke(app, ["recipes", "show", "digits-demo", "--set", "seed=5"])
    assert yaml.safe_load(resolved.stdout)["seed"] == 5
    assert CliRunner().invoke(app, ["recipes", "validate", "digits-demo"]).stdout == "digits-demo: valid\n"
