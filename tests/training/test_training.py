"""A run from end to end on tiny images: the budget, the folder, kills at any step, several processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from fvcore.nn import FlopCountAnalysis
from PIL import Image
from safetensors.torch import load_file, save_model
from timm.data import dataset_factory, resolve_data_config
from timm.optim._optim_factory import create_optimizer_v2
from torch import nn
from torch.utils.data import IterableDataset
from typer.testing import CliRunner

import batude_fx
from batude_fx import BatudeError, Recipe, RecipeError, SavedModelError, TrainingError
from batude_fx.training import problem
from batude_fx.training.checkpoint import read, write
from batude_fx.training.data import Data, _check, _Seeded, image_data
from batude_fx.training.loop import Result
from batude_fx.training.preview import preview
from batude_fx.training.problem import dense_network
from batude_fx.training.recipe import _optimizers, _schedulers, shipped
from batude_fx.tucker.modules import TuckerModule
from batude_fx_cli.app import app

CLASSES, TRAIN, HELD_OUT = 3, 24, 9
SETTINGS = {
    "model": {"name": "test_resnet", "args": {"num_classes": CLASSES}},
    "data": {"image_size": 32, "batch_size": 8, "workers": 0, "scale": [0.5, 1.0]},
    "budget": 0.5,
    "pretrain": {"epochs": 1, "ema": 0.9},
    "one_shot": {"epochs": 2, "interval": "2 steps", "calibration_images": 8, "distillation": {}},
    "finalize": {"epochs": 1, "clip_grad": 1, "batch_norm_images": 16, "ema": 0.5},
    "eval": {"interval": 1, "checkpoint": "1 steps"},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured noise."""
    folder = tmp_path_factory.mktemp("photos")
    values = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", HELD_OUT)):
        for index in range(count):
            place = folder / split / f"class{index % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = values.integers(0, 120, (40, 40, 3), np.uint8)
            pixels[..., index % CLASSES] += 120
            Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def _recipe(photos: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {name: dict(one) if isinstance(one, dict) else one for name, one in SETTINGS.items()}
    settings["data"]["root"] = photos
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings[section] = {**settings[section], name: value} if name else value
    return Recipe.model_validate(settings)


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, batude_fx.run(_recipe(photos), folder)


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


def test_the_folder_tells_the_story(finished: tuple[Path, Any]) -> None:
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


def test_what_was_trained_is_evaluated_on_the_same_images(finished: tuple[Path, Any], photos: Path) -> None:
    folder, result = finished
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    said = CliRunner().invoke(app, ["info", str(folder / "model"), "--json"])
    assert json.loads(said.stdout)["flops"] == result.flops
    said = CliRunner().invoke(app, ["evaluate", str(folder / "model"), "--data", str(photos / "validation"), "--json"])
    assert json.loads(said.stdout)["top1"] == pytest.approx(result.accuracy)


def test_a_class_without_images_to_evaluate_on_moves_no_other(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, some := tmp_path / "photos")
    shutil.rmtree(some / "validation" / "class0")
    recipe = _recipe(some)
    data = image_data(recipe, dense_network(recipe), (3, 32, 32), CLASSES, Accelerator())
    assert torch.cat([labels for _, labels in data.evaluation()]).tolist() == [1] * 3 + [2] * 3


def test_images_of_the_caller_stay_as_they_are(photos: Path) -> None:
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % CLASSES
    before = images.clone()
    halves = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    data = Data(train=lambda _, skip: iter(halves[skip:]), evaluation=lambda: iter(halves), batches=2)
    batude_fx.run(_recipe(photos, data__mixup=0.5), data=data)
    assert torch.equal(images, before)


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
        result = batude_fx.run(_recipe(photos, **changes))
    image = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(result.model(image), seen[0].eval()(image), rtol=1e-3, atol=1e-4)
    assert len(result.ranks) > 3


_ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
_KILLED = """
import os, signal, sys
from batude_fx import Recipe
from batude_fx import run
from batude_fx.training import phase

steps, original = 0, phase._Trainer.step

def step(*arguments):
    global steps
    steps += 1
    if steps > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

phase._Trainer.step = step
run(Recipe.from_yaml(sys.argv[1]), sys.argv[2], resume=sys.argv[4] == "resume")
"""


def test_killed_three_times_it_ends_at_the_same_weights(
    photos: Path, tmp_path: Path, finished: tuple[Path, Any]
) -> None:
    recipe, folder = tmp_path / "my.yaml", tmp_path / "run"
    recipe.write_text(_recipe(photos).to_yaml(), encoding="utf-8")
    steps = np.random.default_rng().integers(1, 4, 3).tolist()  # of 12
    print("killed after", steps)  # noqa: T201 - for whoever sees it fail
    for index, count in enumerate([*steps, 99]):
        arguments = [str(recipe), str(folder), str(count), "resume" if index else "new"]
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _KILLED, *arguments], env=_ONE_THREAD, capture_output=True, text=True, check=False
        )
        assert done.returncode == (0 if count == 99 else -9), done.stderr
    undisturbed, _ = finished
    ours, theirs = (load_file(place / "model" / "model.safetensors") for place in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [(place / "log.jsonl").read_text(encoding="utf-8") for place in (folder, undisturbed)]
    assert logs[0] == logs[1]


_PROCESS = "import sys; from batude_fx import Recipe, run; run(Recipe.from_yaml(sys.argv[1]), sys.argv[2])"


def _processes(count: int, recipe: Path, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _PROCESS, str(recipe), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


WITHOUT_ACCELERATE = """
import sys
sys.modules["accelerate"] = None
import batude_fx
from batude_fx_cli.app import app
app(["train", "digits-demo", "--dry-run", "--json"], standalone_mode=False)
try:
    batude_fx.run(batude_fx.Recipe.from_yaml("digits-demo"))
except batude_fx.TrainingError as error:
    print(error)
"""


def test_without_accelerate_there_is_a_dry_run_and_one_line() -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_ACCELERATE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    facts, _, said = done.stdout.rpartition("}")
    assert json.loads(facts + "}")["factor"] > 1
    assert said.strip() == "training needs accelerate: pip install accelerate tensorboard"


def test_a_dry_run_depends_on_the_seed_alone() -> None:
    recipe = Recipe.from_yaml("digits-demo")
    before = torch.get_rng_state()
    ranks = [preview(recipe).plan.ranks for _ in range(2)]
    assert ranks[0] == ranks[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_is_read_by_one_process(photos: Path) -> None:
    class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return iter(())

        def __len__(self) -> int:
            return TRAIN

    recipe, stream = _recipe(photos), Stream()
    _check(recipe, _Seeded(stream, 0), stream, 1, CLASSES)
    with pytest.raises(TrainingError, match="only one process can read; this run has 2"):
        _check(recipe, _Seeded(stream, 0), stream, 2, CLASSES)


def test_two_processes_end_like_one(photos: Path, tmp_path: Path) -> None:
    """Same ranks, weights within 1e-4 after 21 steps at equal global batch; no batch-norm, which sees its share."""
    changes = {
        "model__args": {"num_classes": CLASSES, "norm_layer": "groupnorm1"}, "pretrain": None,
        "one_shot": {"epochs": 4, "lr": 0.01, "interval": "4 steps", "calibration_images": TRAIN},
        "finalize": {"epochs": 3, "lr": 0.01},
    }  # fmt: skip
    recipe = tmp_path / "my.yaml"
    recipe.write_text(_recipe(photos, **changes).to_yaml(), encoding="utf-8")
    folders = [tmp_path / "one", tmp_path / "two"]
    for count, folder in enumerate(folders, 1):
        _processes(count, recipe, folder)
    one, two = (json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in folders)
    assert two["machine"]["processes"] == 2
    assert one["ranks"] == two["ranks"]
    assert [r["ranks"] for r in one["rounds"]] == [r["ranks"] for r in two["rounds"]]
    ours, theirs = (_composed(batude_fx.load(folder / "model")) for folder in folders)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-4) for name in ours)
    assert one["accuracy"] == two["accuracy"]


def _composed(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all layers, Tucker modules multiplied out: factors are known up to their signs."""
    tucker = {
        name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, TuckerModule)
    }
    weights = {
        n: p.detach() for n, p in model.named_parameters() if not n.startswith(tuple(f"{name}." for name in tucker))
    }
    return weights | tucker


def test_accumulated_parts_are_one_batch(photos: Path) -> None:
    """In float arithmetic, without batch-norm: the same ranks, and the same weights."""
    changes = {
        "model__args": {"num_classes": CLASSES, "norm_layer": "groupnorm1"}, "eval__interval": 9,
        "one_shot__calibration_images": 0,  # judged by images, two ranks can be so close that rounding decides
    }  # fmt: skip
    whole, parts = (batude_fx.run(_recipe(photos, data__accumulate=count, **changes)) for count in (1, 2))
    assert whole.ranks == parts.ranks
    ours, theirs = (_composed(result.model) for result in (whole, parts))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-4) for name in ours)


def test_bfloat16_channels_last_mixup_and_a_moving_average(photos: Path) -> None:
    changes = {
        "model__precision": "bf16", "model__channels_last": True, "data__mixup": 0.2, "data__smoothing": 0.1,
        "data__auto_augment": "rand-m5", "data__erase": 0.2,
        "one_shot__optimizer": "adamw", "one_shot__calibration_images": 0,
    }  # fmt: skip
    result = batude_fx.run(_recipe(photos, **changes))
    assert result.model.training is False
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    assert result.flops <= 0.5 * result.dense_flops


def _data(count: int = 4, size: int = 32, label: int = 1, batches: int = 1) -> Data:
    images, labels = torch.randn(count, 3, size, size), torch.full((count,), label)

    def given(*_: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter([(images, labels)] if count else [])

    return Data(given, given, batches)


@pytest.mark.parametrize(("data", "words"), [
    (_data(count=0), "no images to train on, though 1 batches"),
    (_data(size=16), r"images are \(4, 3, 16, 16\), the network takes \(n, 3, 32, 32\)"),
    (replace(_data(), train=lambda *_: iter([(torch.zeros(0, 3, 32, 32), torch.zeros(0))])), r"images are \(0, 3"),
    (replace(_data(), train=lambda *_: iter([{}])), "images cannot be read: not enough values to unpack"),
    (_data(label=3), r"one class per image, 0 to 2; the first ones are tensor\(\[3"),
    (_data(label=-1), "one class per image"),
    (_data(batches=0), "an epoch has 0 batches, a step takes 1"),
    (replace(_data(), evaluation=_data(count=0).evaluation), "no images to measure accuracy on"),
])  # fmt: skip
def test_images_that_cannot_be_trained_on_are_refused(data: Data, words: str, photos: Path) -> None:
    with pytest.raises(TrainingError, match=words):
        batude_fx.run(_recipe(photos, pretrain=None), data=data)


def test_images_without_colours_meet_a_network_for_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grey(_Torchvision):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.new("L", (32, 32))), index % 10

    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "mnist", Grey)
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "name": "torch/mnist", "root": "data", "download": True}}  # type: ignore[dict-item]
    settings["model"] = {"name": "test_resnet", "args": {"num_classes": 10}}
    with pytest.raises(TrainingError, match="the first training images cannot be read: output with shape"):
        batude_fx.run(Recipe.model_validate(settings))


def test_a_network_without_colours_knows_how_its_images_are_normalized(photos: Path, tmp_path: Path) -> None:
    section = {"name": "test_resnet", "args": {"num_classes": CLASSES, "in_chans": 1}}
    short = {"pretrain": None, "one_shot__epochs": "1 steps", "finalize__epochs": "1 steps"}
    result = batude_fx.run(_recipe(photos, model=section, data__image_size=None, **short), tmp_path / "run")
    for model in (result.model, batude_fx.load(tmp_path / "run" / "model")):
        config = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
        assert (config["input_size"], config["mean"], config["std"]) == ((1, 160, 160), (0.5,), (0.5,))


def test_a_moving_average_of_few_steps_follows_them(photos: Path) -> None:
    """Though a decay of 0.9999 would keep the first weights for thousands of steps."""
    short = {"pretrain": None, "one_shot__epochs": 0, "finalize__batch_norm_images": 0}
    ways = ({"epochs": 0}, {"epochs": 9}, {"epochs": 9, "ema": 0.9999})
    before, after, averaged = (
        nn.utils.parameters_to_vector(batude_fx.run(_recipe(photos, **short, finalize=way)).model.parameters())
        for way in ways
    )
    assert (averaged - before).norm() > 0.3 * (after - before).norm()


def test_what_run_returns_knows_how_it_was_made(photos: Path, tmp_path: Path) -> None:
    short = {"pretrain": None, "one_shot__epochs": "1 steps", "finalize__epochs": 0}
    small = batude_fx.run(_recipe(photos, **short)).model
    batude_fx.save(small, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()
    cast("Any", small).reset_classifier(7)
    batude_fx.save(small, tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()  # its figures are no longer this network's


def test_the_folder_of_a_run_is_told_from_its_networks(finished: tuple[Path, Any]) -> None:
    with pytest.raises(BatudeError, match=r"is the folder of a training run; its network is '.*/model'"):
        batude_fx.create(str(finished[0]))
    with pytest.raises(SavedModelError, match=r"It is a training run; give .*/model"):
        batude_fx.load(finished[0])


def test_a_run_below_a_file_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(TrainingError, match=r"mine\.txt/run cannot be written: Not a directory\. Choose"):
        batude_fx.run(_recipe(photos), tmp_path / "mine.txt" / "run")


def test_a_split_of_another_name_is_not_all_images(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, folder := tmp_path / "photos")
    (folder / "validation").rename(folder / "test")
    with pytest.raises(TrainingError, match=r"has no folder 'validation'; .* by data\.val_split"):
        batude_fx.run(_recipe(folder))
    recipe = _recipe(folder, data__val_split="test")
    data = image_data(recipe, dense_network(recipe), (3, 32, 32), CLASSES, Accelerator())
    assert sum(len(labels) for _, labels in data.evaluation()) == HELD_OUT


class _Torchvision(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """As torchvision's datasets are made and asked, with noise for images and two names for each class."""

    class_to_idx: ClassVar = {f"{name} {index}": index for index in range(10) for name in ("tench", "Tinca")}

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert (root, download) == ("data", True)
        self.count = 128 if train else 20
        self.transform: Any = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
        image = Image.fromarray(pixels)
        return (self.transform(image) if self.transform else image), index % 10


@pytest.mark.parametrize("name", [name for name, path in shipped().items() if "cifar" in path.stem])
def test_recipes_of_torchvisions_images_find_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "cifar10", _Torchvision)
    short = ["pretrain=null", "one_shot.epochs=1 steps", "finalize.epochs=1 steps", "data.workers=0"]
    recipe = Recipe.from_yaml(name, [*short, "model.precision=fp32", "model.name=resnet20_cifar", "budget=0.5"])
    result = batude_fx.run(recipe)
    assert result.flops <= 0.5 * result.dense_flops


def test_the_environment_does_not_divide_gradients(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"pretrain": None, "one_shot__epochs": "2 steps", "finalize__epochs": 0}
    expected = batude_fx.run(_recipe(photos, **changes)).rounds
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert batude_fx.run(_recipe(photos, **changes)).rounds == expected


def test_weights_kept_in_half_precision_train_in_float32(photos: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    save_model(model.bfloat16(), str(tmp_path / "half.safetensors"))
    torch.save(model.state_dict(), tmp_path / "pickled.pth")
    changes = {"pretrain": None, "one_shot__epochs": 0, "finalize__epochs": "1 steps"}
    section = {**SETTINGS["model"], "checkpoint": tmp_path / "half.safetensors"}  # type: ignore[dict-item]
    result = batude_fx.run(_recipe(photos, **changes, model=section))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    with pytest.raises(RecipeError, match=r"pickled\.pth is broken.* becomes one of safetensors by safetensors"):
        batude_fx.run(_recipe(photos, model={**section, "checkpoint": tmp_path / "pickled.pth"}))


def test_a_slow_batch_norm_knows_its_images_before_it_teaches(photos: Path) -> None:
    """torchvision's MobileNets move their statistics by a hundredth a step."""
    changes: dict[str, Any] = {"one_shot__epochs": 0, "finalize__epochs": 0, "budget": 0.9}
    changes |= {"pretrain": {"epochs": 4, "optimizer": "adamw", "lr": 0.003}, "data__scale": [0.9, 1.0]}
    section = {"name": "torchvision:mobilenet_v3_small", "args": {"num_classes": CLASSES}}
    known, stale = (
        batude_fx.run(_recipe(photos, **changes, model=section, finalize__batch_norm_images=count)) for count in (24, 0)
    )
    assert known.original_accuracy > stale.original_accuracy


@pytest.mark.parametrize("left", [".config.json.1.tmp", "model.safetensors"])
def test_killed_while_the_network_is_saved_it_goes_on(left: str, photos: Path, tmp_path: Path) -> None:
    recipe, folder = _recipe(photos, pretrain=None, one_shot__epochs="2 steps", finalize__epochs="1 steps"), tmp_path
    batude_fx.run(recipe, folder / "run")
    (folder / "run" / "result.json").unlink()
    shutil.rmtree(model := folder / "run" / "model")
    model.mkdir()
    (model / left).touch()
    batude_fx.run(recipe, folder / "run", resume=True)
    names = {path.name for path in model.iterdir()}
    assert names == {"config.json", "model.safetensors", "report.html", "report.json"}
    batude_fx.load(model)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".recipe.yaml.1.tmp").touch()
    batude_fx.run(recipe, tmp_path / "new")


def test_cropped_from_padded_images(photos: Path) -> None:
    changes = {"data__pad": 2, "data__image_size": 40, "one_shot__epochs": 0, "pretrain": None, "finalize__epochs": 0}
    assert batude_fx.run(_recipe(photos, **changes)).rounds[-1]["keep"] <= 0.5
    with pytest.raises(TrainingError, match="size, 32 x 32, the first one has 40 x 40 pixels"):
        batude_fx.run(_recipe(photos, **changes | {"data__image_size": 32}))


def test_what_cannot_start_says_why(photos: Path, tmp_path: Path, finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    recipe = _recipe(photos)
    with pytest.raises(TrainingError, match="holds a run already, which is finished"):
        batude_fx.run(recipe, folder)
    with pytest.raises(TrainingError, match="is finished"):
        batude_fx.run(recipe, folder, resume=True)
    with pytest.raises(
        TrainingError, match="another recipe than the one to go on with: there 'seed: 0', here 'seed: 1'"
    ):
        batude_fx.run(_recipe(photos, seed=1), folder, resume=True)
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
        batude_fx.run(_recipe(tmp_path / "nowhere"))
    with pytest.raises(TrainingError, match=r"train has no folder 'train'; give one, .* by data\.train_split"):
        batude_fx.run(_recipe(photos / "train"), tmp_path / "failed")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(TrainingError, match="no split 'train' that can be read"):
        batude_fx.run(_recipe(tmp_path / "empty"))
    assert not (tmp_path / "failed").exists()
    with pytest.raises(TrainingError, match="24 images to train on, a batch takes 64"):
        batude_fx.run(_recipe(photos, data__batch_size=64))
    with pytest.raises(TrainingError, match="24 images to train on, a batch takes 32"):
        batude_fx.run(_recipe(photos, data__batch_size=32, data__accumulate=4))
    with pytest.raises(TrainingError, match="cannot be split into 3 parts"):
        batude_fx.run(_recipe(photos, data__accumulate=3))
    with pytest.raises(TrainingError, match=r"leaves 1 images in each; use a multiple of 16"):
        batude_fx.run(_recipe(photos, data__accumulate=8, data__mixup=0.2))
    with pytest.raises(TrainingError, match=r"has 3 classes, test_resnet tells 2 apart; .*num_classes=3"):
        batude_fx.run(_recipe(photos, model__args={"num_classes": 2}))
    with pytest.raises(TrainingError, match=r"data\.root is not given"):
        batude_fx.run(_recipe(photos, data__root=None))
    shutil.copytree(photos, other := tmp_path / "other")
    (other / "validation" / "class1").rename(other / "validation" / "class3")
    with pytest.raises(TrainingError, match=r"has classes in 'validation' that 'train' lacks: 'class3'\. Images"):
        batude_fx.run(_recipe(other))
    with pytest.raises(RecipeError, match=r"budget: the dense network meets it, with 4,149,568 flops"):
        batude_fx.run(_recipe(photos, budget="1 GFLOPs"))
    with pytest.raises(TrainingError, match=r"gives GoogLeNetOutputs, not logits alone"):
        batude_fx.run(_recipe(photos, model={"name": "torchvision:googlenet", "args": {"num_classes": CLASSES}}))
    with pytest.raises(TrainingError, match=r"data\.auto_augment='randaugment'"):
        batude_fx.run(_recipe(photos, data__auto_augment="randaugment"))
    with pytest.raises(TrainingError, match=r"lower pretrain\.lr, now 1e"):
        batude_fx.run(_recipe(photos, pretrain={"epochs": 1, "lr": 1e30}))


@pytest.mark.parametrize(("phase", "words"), [
    ("pretrain", r"the loss is (nan|inf) after step 2 of pretrain"),
    ("one_shot", r"no longer finite\. Lower one_shot\.lr, now 1e"),
])  # fmt: skip
def test_a_run_that_diverges_says_so_and_writes_no_more(phase: str, words: str, photos: Path, tmp_path: Path) -> None:
    """Evaluations are far apart; a checkpoint is due after every step, a round after every other one."""
    sections: dict[str, dict[str, Any]] = {"pretrain": {"epochs": 1}, "one_shot": {"epochs": 2, "interval": "2 steps"}}
    sections[phase]["lr"] = 1e30
    due = {"interval": "99 steps", "checkpoint": "1 steps" if phase == "pretrain" else "99 steps"}
    with pytest.raises(TrainingError, match=words):
        batude_fx.run(_recipe(photos, **sections, eval=due), tmp_path / "run")
    if phase == "pretrain":
        kept = read(tmp_path / "run" / "checkpoint.safetensors")
        assert kept["step"] == 1


@pytest.mark.parametrize("scheduler", _schedulers())
def test_the_rate_falls_unless_it_is_constant(scheduler: str, photos: Path, tmp_path: Path) -> None:
    finalize = {"epochs": 1, "lr": 0.01, "scheduler": scheduler}
    changes = {"pretrain": None, "one_shot__epochs": 0, "finalize": finalize, "eval__interval": "1 steps"}
    batude_fx.run(_recipe(photos, **changes), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, second, third = (line["lr"] for line in log if line["phase"] == "finalize")
    assert first == pytest.approx(0.01, rel=1e-6)
    assert third == second == first if scheduler == "constant" else 0 < third < second < first


def test_train_on_the_command_line(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(_recipe(photos).to_yaml(), encoding="utf-8")
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


def test_what_torch_says_while_it_fetches_is_not_in_the_json(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetching(*_: object, **__: object) -> nn.Module:
        sys.stdout.write("Downloading")
        return timm.create_model("test_resnet", num_classes=CLASSES)

    monkeypatch.setattr(problem, "create", fetching)
    recipe = tmp_path / "my.yaml"
    short = {"pretrain": None, "one_shot__epochs": 0, "finalize__epochs": 0}
    recipe.write_text(_recipe(photos, **short).to_yaml(), encoding="utf-8")
    done = CliRunner().invoke(app, ["train", str(recipe), "--output", str(tmp_path / "run"), "--json"])
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "run")


def test_checkpoints_keep_whatever_state_there_is(tmp_path: Path) -> None:
    tree = {"a": {"0": torch.arange(3), 1: [1, 2.5, None, "x"]}, "empty": {}, "b": torch.zeros(0)}
    write(tmp_path / "one", tree)
    back = read(tmp_path / "one")
    assert torch.equal(back["a"]["0"], torch.arange(3))
    assert back["a"][1] == [1, 2.5, None, "x"]
    assert back["empty"] == {}
    (tmp_path / "one").write_bytes((tmp_path / "one").read_bytes()[:-4])
    with pytest.raises(TrainingError, match="is broken"):
        read(tmp_path / "one")
    with pytest.raises(TrainingError, match="does not exist"):
        read(tmp_path / "two")


@pytest.mark.parametrize("name", list(_optimizers()))
def test_every_optimizer_of_recipes_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8)

    def started() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
        return model, create_optimizer_v2(model, name, lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = started()
    step(model, optimizer)
    write(tmp_path / "one", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(model, optimizer)
    other, its = started()
    back = read(tmp_path / "one")
    other.load_state_dict(back["model"])
    its.load_state_dict(back["optimizer"])
    step(other, its)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_the_networks_of_the_cifar_papers_have_their_sizes() -> None:
    image = torch.zeros(1, 3, 32, 32)
    for name, flops, params in (
        ("resnet20_cifar", 40.9e6, 0.27e6), ("resnet56_cifar", 126.6e6, 0.85e6), ("vgg16_bn_cifar", 313.8e6, 14.7e6)
    ):  # fmt: skip
        model = timm.create_model(name).eval()
        assert model(image).shape == (1, 10)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=0.02)
        assert FlopCountAnalysis(model, image).unsupported_ops_warnings(enabled=False).total() == pytest.approx(
            flops, rel=0.01
        )


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
