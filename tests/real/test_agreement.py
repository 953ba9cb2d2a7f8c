"""The main job on real weights and real photos: how often the compressed network says what the original says.

`make test-real` prints the tables. No network is trained: 256 shop photos of the train split, or synthetic images, or
nothing at all. Agreement is the share of 400 other shop photos, of the test split, with the same top-1 class as the
original's; the 20 labelled ImageNet photos say what the narrow calibration costs elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batude_fx
from batude_fx.compression.calibrate import Calibration
from tests.real import inputs

pytestmark = pytest.mark.real


@dataclass(frozen=True)
class Score:
    """What one compressed network reaches.

    Attributes:
        agreement: Share of the shop photos with the original's top-1 class.
        top1: Of the 20 labelled photos.
        top5: Of the 20 labelled photos.
    """

    agreement: float
    top1: int
    top5: int


@dataclass(frozen=True)
class Photos:
    """Normalized photos: for calibration, for agreement, and labelled ones."""

    calibration: Tensor
    held_out: Tensor
    labelled: Tensor
    labels: Tensor


def _photos(mean: tuple[float, ...], std: tuple[float, ...]) -> Photos:
    labelled, labels = inputs.labelled_photos(mean, std)
    return Photos(
        inputs.shop_photos("train", 256, mean, std), inputs.shop_photos("test", 400, mean, std), labelled, labels
    )


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in torch.split(images, 16)])


def _score(model: nn.Module, photos: Photos, original: Tensor) -> Score:
    top5 = _logits(model, photos.labelled).topk(5).indices
    hits = top5 == photos.labels[:, None]
    agreement = (_logits(model, photos.held_out).argmax(1) == original).float().mean().item()
    return Score(agreement, int(hits[:, 0].sum()), int(hits.sum()))


def _scores(model: nn.Module, photos: Photos, keeps: tuple[float, ...]) -> dict[tuple[str, float], Score]:
    """Every way of calibrating at every budget; each budget is checked by fvcore."""
    original = _logits(model, photos.held_out).argmax(1)
    example = photos.labelled[:1]
    dense = FlopCountAnalysis(model, example).total()
    scores = {}
    ways: dict[str, Calibration] = {"weights only": None, "synthetic": "synthetic", "256 photos": photos.calibration}
    for way, calibration in ways.items():
        plan = batude_fx.plan(model, keeps[0], calibration=calibration, example_inputs=example)
        for keep in keeps:
            small = plan.at(keep).apply(model)
            assert FlopCountAnalysis(small, example).total() <= keep * dense
            scores[way, keep] = _score(small, photos, original)
    return scores


def _print(title: str, scores: dict[tuple[str, float], Score]) -> None:
    table = Table("calibration", "flops kept", "agreement (400 photos)", "top-1 of 20", "top-5 of 20", title=title)
    for (way, keep), score in scores.items():
        table.add_row(way, f"{keep:.2f}", f"{score.agreement:.4f}", str(score.top1), str(score.top5))
    Console(width=100).print(table)


@pytest.fixture(scope="module")
def imagenet_photos() -> Photos:
    return _photos(inputs.IMAGENET_MEAN, inputs.IMAGENET_STD)


@pytest.fixture
def _shown(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """What a test prints is the point of it."""
    with capsys.disabled():
        yield


@pytest.mark.usefixtures("_shown")
def test_resnet50_without_training(imagenet_photos: Photos) -> None:
    scores = _scores(inputs.resnet50_torchvision(), imagenet_photos, (0.75, 0.6, 0.5, 0.4))
    _print("ResNet-50 (torchvision), ImageNet weights, no training", scores)
    # Floors a little below the figures of 2026-11-23: they guard against decay, the table says how good it is.
    assert scores["256 photos", 0.5].agreement >= 0.86
    assert scores["256 photos", 0.5].top1 >= 17
    assert scores["256 photos", 0.4].top5 >= 18
    assert scores["synthetic", 0.6].agreement >= 0.70
    assert scores["synthetic", 0.5].agreement >= 0.60


@pytest.mark.usefixtures("_shown")
def test_timm_and_torchvision_copies_give_the_same_network(imagenet_photos: Photos) -> None:
    photos = imagenet_photos
    torchvision_small, timm_small = (
        batude_fx.compress(
            model, 0.5, calibration=imagenet_photos.calibration[:32], example_inputs=imagenet_photos.labelled[:1]
        )
        for model in (inputs.resnet50_torchvision(), inputs.resnet50_timm())
    )
    images = photos.held_out[:64]
    torchvision_logits, timm_logits = _logits(torchvision_small, images), _logits(timm_small, images)
    difference = (torchvision_logits - timm_logits).abs().max().item()
    print(f"\nResNet-50 at 0.5, torchvision's copy against timm's: largest difference of the logits {difference:.2e}")
    assert difference <= 1e-3
    assert type(timm_small).__module__.startswith("timm.")


@pytest.mark.usefixtures("_shown")
def test_efficientnet_lite0_without_training() -> None:
    photos = _photos(inputs.HALF, inputs.HALF)
    scores = _scores(inputs.efficientnet_lite0(), photos, (0.8, 0.6))
    _print("EfficientNet-Lite0 (timm), ImageNet weights, no training", scores)
    assert scores["256 photos", 0.8].agreement > scores["weights only", 0.8].agreement


@pytest.mark.usefixtures("_shown")
def test_mobilenet_v2_without_training(imagenet_photos: Photos) -> None:
    scores = _scores(inputs.mobilenet_v2(), imagenet_photos, (0.95, 0.9, 0.8, 0.6))
    _print("MobileNetV2 (torchvision), ImageNet weights, no training", scores)
    assert scores["256 photos", 0.9].agreement > scores["synthetic", 0.9].agreement
