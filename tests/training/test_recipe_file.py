"""A recipe that is broken is answered with the line and the key of every mistake."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from batude_fx_cli.app import app
from tests.training.recipe_text import GOOD, recipe_file

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
    "epochs as text": ("  epochs: 3", "  epochs: three", 7, "one_shot.epochs", "'three' is not a length of training"),
    "two budgets in conflict": ("2.5x", "{flops: 0.9, params: 0.001}", 5, "budget", "0.0010 of the params is out of"),
    "a list as a key": ("  root: photos", "  root: photos\n  [a]: 1", 5, "data", "a key is no text"),
    "an alias": ("  name: resnet10t", "  name: &a resnet10t\n  checkpoint: *a", 3, "", "aliases"),
    "no YAML": ("  root: photos", "  root: [photos", 5, "", "not YAML"),
    "missing section": ("budget: 2.5x\n", "", 1, "budget", "missing"),
    "rho falls": ("  epochs: 3", "  epochs: 3\n  rho: [1, 0.1]", 6, "one_shot", "rho falls from 1 to 0.1"),
    "unknown argument": ("resnet10t", "resnet10t\n  args: {foo: 1}", 1, "model", "foo"),
    "missing checkpoint": ("resnet10t", "resnet10t\n  checkpoint: a.bin", 1, "model", "'a.bin' does not exist"),
    "weights among arguments": (
        "resnet10t", "resnet10t\n  args: {checkpoint_path: evil.pth}", 1, "model", "weights by 'checkpoint_path'"
    ),
    "a scheduler of epochs": ("  epochs: 3", "  epochs: 3\n  scheduler: step", 8, "one_shot.scheduler", "cosine, tanh"),
    "an interval of nothing": ("interval: 50%", "interval: 0", 8, "one_shot.interval", "0 epochs is not an interval"),
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
    "endless training": ("  epochs: 3", "  epochs: 99999999", 7, "one_shot.epochs", "1e+08 is too long; write at most"),
    "a length of 400 digits": ("  epochs: 3", "  epochs: " + "9" * 400, 7, "one_shot.epochs", "is not a length of"),
    "a number of 5000 digits": ("  epochs: 3", "  epochs: 3\n  lr: " + "9" * 5000, 8, "one_shot.lr", "is no number"),
    "nothing after 0x": ("  epochs: 3", "  epochs: 3\n  lr: 0x", 8, "one_shot.lr", "valid number"),
    "deep nesting": ("  root: photos", "  root: " + "[" * 400 + "]" * 400, 4, "", "more than 20 levels deep"),
    "a huge image": ("  root: photos", "  root: photos\n  image_size: 99999", 5, "data.image_size", "equal to 1536"),
    "a huge argument": ("resnet10t", "resnet10t\n  args: {num_classes: 999999999}", 1, "model", "num_classes as 9999"),
    "an endless argument": ("resnet10t", "resnet10t\n  args: {num_classes: " + "9" * 400 + "}", 1, "model", "as 9999"),
    "a huge grid": ("resnet10t", "resnet10t\n  args: {img_size: 28000}", 1, "model", "img_size as 28000"),
    "images without channels": ("resnet10t", "resnet10t\n  args: {in_chans: 0}", 1, "model", "in_chans as 0"),
    "images without pixels": ("resnet10t", "resnet10t\n  args: {img_size: -1}", 1, "model", "img_size as -1"),
    "no classifier": ("resnet10t", "torchvision:raft_small", 2, "model.name", "classifier"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_answered_in_one_line(name: str, tmp_path: Path) -> None:
    old, new, line, key, words = BROKEN[name]
    assert old in GOOD
    path = recipe_file(tmp_path, GOOD.replace(old, new, 1))
    result = CliRunner().invoke(app, ["recipes", "validate", str(path)])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{path}:{line}: {key}")
    assert words in result.stderr


def test_thousands_of_mistakes_are_answered_in_a_few_lines(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, GOOD + "".join(f"key{number}: 1\n" for number in range(20_000)))
    lines = CliRunner().invoke(app, ["recipes", "validate", str(path)]).stderr.splitlines()
    assert len(lines) == 21
    assert max(map(len, lines)) < 500
    assert lines[-1].endswith("and 19980 more problems.")


def test_a_file_that_is_no_recipe_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    result = CliRunner().invoke(app, ["recipes", "validate", str(path)])
    assert result.stderr == f"{path}:1: the file has 1099511627776 bytes; expected a recipe of at most 1048576.\n"


@pytest.mark.parametrize("setting", ["one_shot.epochs=" + "[" * 5000, "one_shot.lr=" + "9" * 5000])
def test_a_setting_of_the_command_line_has_the_same_limits(setting: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["recipes", "show", str(recipe_file(tmp_path, GOOD)), "--set", setting])
    assert result.exit_code == 1
    assert "the value is not YAML" in result.stderr
    assert result.stderr.count("\n") == 1


def test_too_many_rounds_are_refused(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, GOOD.replace("epochs: 3", "epochs: 90000").replace("50%", "1 steps"))
    result = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--set", "one_shot.epochs=9999999 steps"])
    assert result.exit_code == 1
    assert "make 9999999 rounds; expected at most 10000" in result.stderr


def test_every_mistake_has_a_line(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path, GOOD.replace("  epochs: 3", "  epochs: three").replace("  interval: 50%", "  intervall: 50%")
    )
    result = CliRunner().invoke(app, ["recipes", "validate", str(path)])
    assert [line.split(": ")[0] for line in sorted(result.stderr.splitlines())] == [f"{path}:7", f"{path}:8"]


def test_train_gives_every_mistake_a_line_too(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, GOOD.replace("  epochs: 3", "  epochs: three\n  lr: 0"))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 1
    lines = sorted(line.removeprefix("error: ") for line in result.stderr.splitlines())
    assert [line.split(": ")[0] for line in lines] == [f"{path}:7", f"{path}:8"]
