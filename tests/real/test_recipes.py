"""An ImageNet recipe on real photographs: from the command line to the saved network."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import batude_fx
from batude_fx_cli.app import app
from tests.real.inputs import shop_folder


@pytest.mark.real
def test_one_epoch_of_an_imagenet_recipe_on_shop_photos(tmp_path: Path) -> None:
    shop_folder(tmp_path / "shop")
    settings = [
        f"data.root={tmp_path / 'shop'}", "data.image_size=128", "data.batch_size=32", "data.workers=2",
        "model.args.num_classes=14", "model.pretrained=false", "one_shot.epochs=1", "finalize.epochs=1",
        "one_shot.calibration_images=64", "finalize.warmup=0",
    ]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    output = tmp_path / "run"
    done = CliRunner().invoke(app, ["train", "resnet18-imagenet-2.52x", "--output", str(output), "--json", *options])
    assert done.exit_code == 0, done.stderr
    print(done.stderr)
    facts = json.loads(done.stdout)
    print({name: facts[name] for name in ("original_accuracy", "accuracy", "dense_flops", "flops", "params")})
    assert 0.98 <= 2.52 * facts["flops"] / facts["dense_flops"] <= 1
    small = batude_fx.load(output / "model").eval()
    assert small(torch.zeros(1, 3, 128, 128)).shape == (1, 14)
