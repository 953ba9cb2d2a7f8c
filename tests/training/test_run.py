"""A run from end to end on tiny images: the budget, the folder, the exact decomposition, and what cannot start."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import batude_fx
from batude_fx import BatudeError, RecipeError, SavedModelError, TrainingError
from batude_fx_cli.app import app
from tests.training.tiny_recipe import CLASSES, tiny_recipe


def test_the_budget_holds_by_fvcore_and_is_used(finished: tuple[Path, Any]) -> None:
    _, result = finished
    dense = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    image = torch.zeros(1, 3, 32, 32)
    before, after = (
        FlopCountAnalysis(model, image).unsupported_ops_warnings(enabled=False) for model in (dense, result.model)
    )
    assert result.dense_flops == before.total()
    assert result.flops == after.total()
    assert 0.98 * 0.5 * before.total() <= after.total() <= 0.5 * before.total()


def test_the_folder_holds_recipe_log_result_and_network(finished: tuple[Path, Any]) -> None:
    folder, result = finished
    assert {path.name for path in folder.iterdir()} >= {
        "recipe.yaml", "original.safetensors", "log.jsonl", "result.json", "ranks.png", "model"
    }  # fmt: skip
    assert not (folder / "checkpoint.safetensors").exists()
    assert not list(folder.glob(".*"))
    report = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert report["accuracy"] == result.accuracy
    assert {"torch", "timm", "batude-fx"} <= set(report["versions"])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log if line["phase"] == "finalize"] == [3]
    rounds = [line for line in log if "round" in line]
    assert [line["step"] for line in rounds] == [0, 2, 4, 6]  # and once more after the last step
    assert rounds[0]["keep"] > rounds[-1]["keep"] <= 0.5
    loaded = batude_fx.load(folder / "model").eval()
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(image), result.model(image))
    assert Image.open(folder / "ranks.png").size[0] > 500


def test_a_trained_network_is_evaluated_on_the_same_images(finished: tuple[Path, Any], photos: Path) -> None:
    folder, result = finished
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    said = CliRunner().invoke(app, ["info", str(folder / "model"), "--json"])
    assert json.loads(said.stdout)["flops"] == result.flops
    said = CliRunner().invoke(app, ["evaluate", str(folder / "model"), "--data", str(photos / "validation"), "--json"])
    assert json.loads(said.stdout)["top1"] == pytest.approx(result.accuracy)


def test_before_factors_are_trained_the_decomposition_is_exact(photos: Path) -> None:
    """The last round leaves weights of exactly the ranks that are decomposed: HOSVD loses nothing."""
    changes = {"finalize__epochs": 0, "finalize__batch_norm_images": 0, "eval__interval": 9}
    from batude_fx.training import loop

    seen: list[nn.Module] = []
    original = loop.factorize

    def spy(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        seen.append(model)
        return original(model, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "factorize", spy)
        result = batude_fx.run(tiny_recipe(photos, **changes))
    image = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(result.model(image), seen[0].eval()(image), rtol=1e-3, atol=1e-4)
    assert len(result.ranks) > 3


def test_the_returned_network_is_saved_with_its_report_until_it_is_changed(photos: Path, tmp_path: Path) -> None:
    short = {"pretrain": None, "one_shot__epochs": "1 steps", "finalize__epochs": 0}
    small = batude_fx.run(tiny_recipe(photos, **short)).model
    batude_fx.save(small, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()
    cast("Any", small).reset_classifier(7)
    batude_fx.save(small, tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()  # its figures are no longer this network's


def test_the_folder_of_a_run_is_refused_with_the_place_of_its_network(finished: tuple[Path, Any]) -> None:
    with pytest.raises(BatudeError, match=r"is the folder of a training run; its network is '.*/model'"):
        batude_fx.create(str(finished[0]))
    with pytest.raises(SavedModelError, match=r"It is a training run; give .*/model"):
        batude_fx.load(finished[0])


def test_a_run_below_a_file_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(TrainingError, match=r"mine\.txt/run cannot be written: Not a directory\. Choose"):
        batude_fx.run(tiny_recipe(photos), tmp_path / "mine.txt" / "run")


def test_runs_that_cannot_start_are_refused_with_the_reason(
    photos: Path, tmp_path: Path, finished: tuple[Path, Any]
) -> None:
    folder, _ = finished
    recipe = tiny_recipe(photos)
    with pytest.raises(TrainingError, match="holds a run already, which is finished"):
        batude_fx.run(recipe, folder)
    with pytest.raises(TrainingError, match="is finished"):
        batude_fx.run(recipe, folder, resume=True)
    with pytest.raises(TrainingError, match="differs from the recipe of this run: there 'seed: 0', here 'seed: 1'"):
        batude_fx.run(tiny_recipe(photos, seed=1), folder, resume=True)
    with pytest.raises(TrainingError, match="holds no run"):
        batude_fx.run(recipe, tmp_path, resume=True)
    with pytest.raises(TrainingError, match="needs the folder"):
        batude_fx.run(recipe, resume=True)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(TrainingError, match="holds other files"):
        batude_fx.run(recipe, tmp_path)
    with pytest.raises(TrainingError, match=r"mine\.txt is a file"):
        batude_fx.run(recipe, tmp_path / "mine.txt")
    with pytest.raises(TrainingError, match=r"nowhere' does not exist; give a folder with 'train'"):
        batude_fx.run(tiny_recipe(tmp_path / "nowhere"))
    with pytest.raises(TrainingError, match=r"train has no folder 'train'; give one, .* by data\.train_split"):
        batude_fx.run(tiny_recipe(photos / "train"), tmp_path / "failed")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(TrainingError, match="no split 'train' that can be read"):
        batude_fx.run(tiny_recipe(tmp_path / "empty"))
    assert not (tmp_path / "failed").exists()
    with pytest.raises(TrainingError, match="24 images to train on, a batch takes 64"):
        batude_fx.run(tiny_recipe(photos, data__batch_size=64))
    with pytest.raises(TrainingError, match="24 images to train on, a batch takes 32"):
        batude_fx.run(tiny_recipe(photos, data__batch_size=32, data__accumulate=4))
    with pytest.raises(TrainingError, match="cannot be split into 3 parts"):
        batude_fx.run(tiny_recipe(photos, data__accumulate=3))
    with pytest.raises(TrainingError, match=r"leaves 1 images in each; use a multiple of 16"):
        batude_fx.run(tiny_recipe(photos, data__accumulate=8, data__mixup=0.2))
    with pytest.raises(TrainingError, match=r"has 3 classes, test_resnet has 2 outputs; .*num_classes=3"):
        batude_fx.run(tiny_recipe(photos, model__args={"num_classes": 2}))
    with pytest.raises(TrainingError, match=r"data\.root is not given"):
        batude_fx.run(tiny_recipe(photos, data__root=None))
    shutil.copytree(photos, other := tmp_path / "other")
    (other / "validation" / "class1").rename(other / "validation" / "class3")
    with pytest.raises(TrainingError, match=r"has classes in 'validation' that 'train' lacks: 'class3'\. Images"):
        batude_fx.run(tiny_recipe(other))
    with pytest.raises(RecipeError, match=r"budget: the dense network meets it, with 4,149,568 flops"):
        batude_fx.run(tiny_recipe(photos, budget="1 GFLOPs"))
    with pytest.raises(TrainingError, match=r"gives GoogLeNetOutputs, not logits alone"):
        batude_fx.run(tiny_recipe(photos, model={"name": "torchvision:googlenet", "args": {"num_classes": CLASSES}}))
    with pytest.raises(TrainingError, match=r"data\.auto_augment='randaugment'"):
        batude_fx.run(tiny_recipe(photos, data__auto_augment="randaugment"))
    with pytest.raises(
        TrainingError,
        match=r"Lower pretrain\.lr, now 1e\S+, clip the gradient by .*, or look for NaN",
    ):
        batude_fx.run(tiny_recipe(photos, pretrain={"epochs": 1, "lr": 1e30}))
