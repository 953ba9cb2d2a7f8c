"""The quality that a plan names is that of its network, on images that no statistic has seen."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batude_fx
from batude_fx import QualityWarning
from batude_fx.graph.provenance import attached_record
from tests.compression.common import EXAMPLE, same_bits


def _classifier() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 4)).eval()


def _images(count: int = 80) -> Tensor:
    return torch.randn(count, *EXAMPLE.shape[1:], generator=torch.Generator().manual_seed(1))


def test_the_figures_are_those_of_the_images_held_back() -> None:
    model, images = _classifier(), _images()
    plan = batude_fx.plan(model, 0.6, example_inputs=EXAMPLE, calibration=images)
    held_back = images[4::5]
    with torch.no_grad():
        agreement = (plan.apply(model)(held_back).argmax(1) == model(held_back).argmax(1)).sum()
    assert plan.quality is not None
    assert not plan.quality.synthetic
    assert plan.quality.agreement.hits == agreement
    assert plan.quality.agreement.images == plan.quality.images == 16


def test_images_held_back_change_nothing_but_the_figures() -> None:
    model, images, others = _classifier(), _images(), _images()
    others[4::5] += 0.5
    first, second = (
        batude_fx.plan(model, 0.6, example_inputs=EXAMPLE, calibration=each, round_to=4) for each in (images, others)
    )
    assert same_bits(first.apply(model), second.apply(model))
    assert first.quality.divergence != second.quality.divergence


@pytest.mark.parametrize("calibration", [None, _images(39)], ids=["weights only", "few"])
def test_nothing_is_measured_without_images_to_hold_back(calibration: Tensor | None) -> None:
    plan = batude_fx.plan(_classifier(), 0.6, example_inputs=EXAMPLE, calibration=calibration)
    assert plan.quality is None
    assert "not measured" in " ".join(str(plan).split())


def test_the_figures_are_kept_with_the_network(tmp_path: Path) -> None:
    model = _classifier()
    plan = batude_fx.plan(model, 0.6, example_inputs=EXAMPLE, calibration=_images())
    small = batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=_images())
    assert attached_record(small).quality == plan.quality
    assert plan.at(0.5).quality is None
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path)
    assert attached_record(batude_fx.load(tmp_path, model=_classifier())).quality == plan.quality
    assert f"network {plan.quality}" in (tmp_path / "report.html").read_text()


def test_the_figures_of_other_weights_are_not_kept(tmp_path: Path) -> None:
    small = batude_fx.compress(_classifier(), 0.6, example_inputs=EXAMPLE, calibration=_images())
    with torch.no_grad():
        next(small.parameters()).mul_(1.01)  # as training does
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path)
    assert attached_record(batude_fx.load(tmp_path, model=_classifier())).quality is None
    assert "Quality was not measured" in (tmp_path / "report.html").read_text()


def test_generated_images_are_held_back_too() -> None:
    plan = batude_fx.plan(_classifier(), 0.6, example_inputs=EXAMPLE)
    assert plan.quality.synthetic
    assert plan.quality.images == 32


def test_a_low_quality_is_said_with_its_way_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(1024, 40))
    with pytest.warns(QualityWarning, match=r"agrees with the original on .* generated images.*Calibrate with photos"):
        batude_fx.compress(model, 0.25, example_inputs=EXAMPLE, round_to=1)
    with pytest.warns(QualityWarning, match=r"Allow a larger budget"):
        batude_fx.compress(model, 0.25, example_inputs=EXAMPLE, round_to=1, calibration=_images())


def test_a_high_quality_is_no_warning() -> None:
    with warnings.catch_warnings(action="error"):
        batude_fx.compress(_classifier(), 0.9, example_inputs=EXAMPLE, round_to=1, calibration=_images())


def test_other_outputs_are_measured_one_by_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1))
    plan = batude_fx.plan(model, 0.6, example_inputs=EXAMPLE, calibration=_images(), round_to=2)
    (error,) = plan.quality.outputs
    assert plan.quality.agreement is None
    assert 0 < error.relative_error < 1
    assert error.psnr is not None
