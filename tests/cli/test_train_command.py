"""`batude-fx train`: dry runs, short runs, and output that is JSON alone."""

import json
import sys
from pathlib import Path

import pytest
import timm
from torch import nn
from typer.testing import CliRunner

from batude_fx.training import problem
from batude_fx_cli.app import app
from tests.training.tiny_recipe import CLASSES, tiny_recipe, write_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured noise."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder)
    return folder


def test_train_shows_a_dry_run_and_trains(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(tiny_recipe(photos).to_yaml(), encoding="utf-8")
    dry = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "--set", "data.root=nowhere"])
    assert dry.exit_code == 0, dry.stderr
    assert "root: nowhere" in dry.stdout
    assert "Nothing was trained" in dry.stdout
    facts = json.loads(CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "--json"]).stdout)
    assert facts["factor"] >= 2
    assert facts["rounds"] == []  # an interval in steps of a phase in epochs
    halves = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "--json", "--set", "one_shot.interval=0.5"])
    assert [epoch for epoch, _, _ in json.loads(halves.stdout)["rounds"]] == [0, 0.5, 1, 1.5]
    output = tmp_path / "run"
    short = ["--set", "pretrain=null", "--set", "one_shot.epochs=1 steps", "--set", "finalize.epochs=1 steps"]
    done = CliRunner().invoke(app, ["train", str(recipe), "--model", "test_byobnet", "--output", str(output), *short])
    assert done.exit_code == 0, done.stderr
    assert "round   0" in done.stderr
    assert "original" in done.stdout
    drawn = CliRunner().invoke(app, ["report", str(output)])
    assert str(output / "model" / "ranks.png") in drawn.stdout.split()
    again = CliRunner().invoke(app, ["train", str(recipe), "--output", str(output)])
    assert again.exit_code == 1
    assert again.stderr.count("\n") == 1


def test_what_torch_prints_while_it_downloads_is_not_in_the_json(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetching(*_: object, **__: object) -> nn.Module:
        sys.stdout.write("Downloading")
        return timm.create_model("test_resnet", num_classes=CLASSES)

    monkeypatch.setattr(problem, "create", fetching)
    recipe = tmp_path / "my.yaml"
    short = {"pretrain": None, "one_shot__epochs": 0, "finalize__epochs": 0}
    recipe.write_text(tiny_recipe(photos, **short).to_yaml(), encoding="utf-8")
    done = CliRunner().invoke(app, ["train", str(recipe), "--output", str(tmp_path / "run"), "--json"])
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "run")
