"""YOLO of ultralytics: a compressed network put back in its place, and all that its users then do with it."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer

import batude_fx
from tests.others.common import (
    assert_close,
    assert_exported,
    assert_same_outputs,
    assert_saved_and_loaded,
    assert_step_changes_factors,
    flops,
    noise,
    run_onnx,
    tensors,
    tucker_modules,
    unchanged,
    with_trained_norms,
)

pytestmark = pytest.mark.others

ROOT = Path(__file__).parents[2]
SIDE = 64
EXAMPLE = noise(1, 3, SIDE, SIDE)
BUDGET = 0.6
# To the size of an image in which random weights predict boxes that train all three scales. The second one has two
# heads, of which `fuse` removes one.
ARCHITECTURES = {"yolo11n.yaml": 640, "yolo26n.yaml": 128}


def call(network: nn.Module) -> object:
    return network(noise(2, 3, SIDE, SIDE))


def fresh(architecture: str) -> YOLO:
    """Return a YOLO with the same random weights at each call."""
    torch.manual_seed(0)
    yolo = YOLO(architecture)
    with_trained_norms(yolo.model)
    return yolo


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def small(architecture: str) -> nn.Module:
    """The compressed network, which no test changes."""
    model: nn.Module = fresh(architecture).model
    return batude_fx.compress(model, BUDGET, example_inputs=EXAMPLE)


@pytest.fixture
def yolo(architecture: str, small: nn.Module) -> YOLO:
    """A YOLO object that holds a copy of the compressed network."""
    yolo = fresh(architecture)
    yolo.model = copy.deepcopy(small)
    return yolo


@pytest.fixture
def image() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def dataset(tmp_path: Path, image: NDArray[np.uint8]) -> Path:
    """Two images with one box each, for training and for validation, as ultralytics reads them."""
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / part).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(image).save(tmp_path / "images" / part / f"{index}.png")
            (tmp_path / "labels" / part / f"{index}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    file = tmp_path / "data.yaml"
    file.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: {dict(enumerate('ab' * 40))}\n")
    return file


def assert_deployed(deployed: nn.Module, small: nn.Module) -> None:
    """Assert that what ultralytics made of a network for inference computes the same, and nothing became dense."""
    assert_same_outputs(deployed, small, lambda network: boxes(call(network)))
    kept = {name for name, _ in deployed.named_modules()} & tucker_modules(small).keys()
    assert kept == tucker_modules(deployed).keys()
    assert kept
    assert flops(deployed, EXAMPLE) <= flops(small, EXAMPLE)


def boxes(output: Any) -> Tensor:
    """Return the boxes and scores of an output; the other tensors are for the loss."""
    return tensors(output)[0]


def test_the_budget_holds_and_the_original_is_left_as_it_was(architecture: str) -> None:
    model = fresh(architecture).model
    model.model[2].register_forward_hook(lambda *_: None)
    with unchanged(model):
        small = batude_fx.compress(model, BUDGET, example_inputs=EXAMPLE, calibration=None)
    assert type(small) is type(model)
    assert flops(small, EXAMPLE) <= BUDGET * flops(model, EXAMPLE)
    assert (small.yaml, small.names, small.save, small.task) == (model.yaml, model.names, model.save, model.task)
    assert torch.equal(small.stride, model.stride)
    assert len(small.model[2]._forward_hooks) == 1


def test_predict_computes_what_the_network_does(yolo: YOLO, small: nn.Module, image: NDArray[np.uint8]) -> None:
    with unchanged(yolo.model):
        (result,) = yolo.predict(image, imgsz=SIDE, conf=1e-9, verbose=False)
    assert len(result.boxes)
    assert_deployed(yolo.predictor.model.model, small)


def test_predict_detects_the_same_after_folding(
    architecture: str, yolo: YOLO, small: nn.Module, image: NDArray[np.uint8]
) -> None:
    folded = fresh(architecture)
    folded.model = batude_fx.fold(small, EXAMPLE)
    (ours,), (theirs,) = (one.predict(image, imgsz=SIDE, conf=1e-9, verbose=False) for one in (yolo, folded))
    assert_close(ours.boxes.conf, theirs.boxes.conf)
    assert_deployed(folded.predictor.model.model, small)


def test_validation_runs(yolo: YOLO, small: nn.Module, dataset: Path) -> None:
    metrics = yolo.val(data=str(dataset), imgsz=SIDE, batch=2, workers=0, plots=False, verbose=False, device="cpu")
    assert 0 <= metrics.box.map <= 1
    assert_deployed(yolo.model, small)


def test_a_step_on_its_own_loss_changes_the_factors(architecture: str, small: nn.Module) -> None:
    side = ARCHITECTURES[architecture]
    batch = {  # boxes of many sizes, as each of the three scales is trained by those that are assigned to it
        "img": noise(1, 3, side, side), "cls": torch.arange(16.0)[:, None], "batch_idx": torch.zeros(16),
        "bboxes": torch.cat([0.5 + 0.2 * (noise(16, 2) - 0.5), torch.linspace(0.1, 0.8, 16)[:, None].expand(16, 2)], 1),
    }  # fmt: skip

    def loss(network: nn.Module) -> Tensor:
        network.args = get_cfg()  # as its trainer does
        total: Tensor = network(batch)[0].sum()
        return total

    assert_step_changes_factors(small, loss)


def test_its_trainer_trains_a_compressed_network(yolo: YOLO, small: nn.Module, dataset: Path, tmp_path: Path) -> None:
    class Trainer(DetectionTrainer):
        def get_model(self, *_: object, **__: object) -> nn.Module:
            return copy.deepcopy(small)

    yolo.train(
        trainer=Trainer, data=str(dataset), imgsz=SIDE, batch=2, epochs=1, workers=0, plots=False, verbose=False,
        device="cpu", optimizer="SGD", project=str(tmp_path / "runs"),
    )  # fmt: skip
    assert tucker_modules(yolo.model).keys() == tucker_modules(small).keys()
    changed = [
        name for name, module in tucker_modules(yolo.model).items()
        if not torch.equal(module.weight, tucker_modules(small)[name].weight)
    ]  # fmt: skip
    assert changed == list(tucker_modules(small))


def test_a_checkpoint_of_ultralytics_is_read_and_predicts(
    yolo: YOLO, small: nn.Module, image: NDArray[np.uint8], tmp_path: Path
) -> None:
    yolo.save(tmp_path / "small.pt")
    read = YOLO(tmp_path / "small.pt")
    assert_same_outputs(
        read.model, small, lambda network: boxes(call(network)), tolerance=0.01
    )  # it is in half precision
    (result,) = read.predict(image, imgsz=SIDE, conf=1e-9, verbose=False)
    assert len(result.boxes)
    assert_deployed(read.predictor.model.model, read.model)


def test_saved_and_loaded_it_is_the_same_to_the_bit(architecture: str, small: nn.Module, tmp_path: Path) -> None:
    assert_saved_and_loaded(small, fresh(architecture).model, call, tmp_path / "out")


def test_a_loaded_network_predicts(
    architecture: str, small: nn.Module, image: NDArray[np.uint8], tmp_path: Path
) -> None:
    yolo = fresh(architecture)
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path / "out")
    yolo.model = batude_fx.load(tmp_path / "out", model=yolo.model)
    (result,) = yolo.predict(image, imgsz=SIDE, conf=1e-9, verbose=False)
    assert len(result.boxes)
    assert_deployed(yolo.predictor.model.model, small)


def test_exported_by_batude_fx_it_computes_the_same(small: nn.Module, tmp_path: Path) -> None:
    assert_exported(small, EXAMPLE, call, [noise(2, 3, SIDE, SIDE)], tmp_path / "small.onnx")


def test_the_example_of_the_guide_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "examples.yolo", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "boxes\nexported: " in done.stdout


@pytest.mark.filterwarnings("ignore")  # ultralytics uses torch's older exporter, which has much to say
def test_exported_by_ultralytics_it_computes_the_same(yolo: YOLO, small: nn.Module, image: NDArray[np.uint8]) -> None:
    path = yolo.export(format="onnx", imgsz=SIDE, simplify=False, verbose=False)
    with torch.no_grad():
        expected = boxes(copy.deepcopy(small).eval()(EXAMPLE))
    assert_close(expected, run_onnx(Path(path), [EXAMPLE])[0])
    (result,) = YOLO(path, task="detect").predict(image, imgsz=SIDE, conf=1e-9, verbose=False)
    assert len(result.boxes)
