"""The figures of quality are those of closed formulas, scipy's distances and plain counting."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batude_fx.quality.comparison import QualityMeter
from batude_fx.support.inputs import Inputs


class _Gives(nn.Module):
    """Gives what a function makes of its input, whatever that is."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _batches(x: Tensor, size: int = 3) -> list[Inputs]:
    return [Inputs((part,)) for part in torch.split(x, size)]


def test_a_classifier_is_judged_by_divergence_and_agreement() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2]])
    others = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.45, 0.25], [0.2, 0.1, 0.7], [0.2, 0.3, 0.5]])
    tables = torch.stack([probabilities, others], 1).log()  # (N, 2, classes)
    quality = QualityMeter(_Gives(lambda x: x[:, 0]), _batches(tables), synthetic=False).measure(
        _Gives(lambda x: x[:, 1])
    )
    divergences = (probabilities.double() * (probabilities.double() / others.double()).log()).sum(1)
    assert quality.images == 4
    assert quality.divergence is not None
    assert quality.divergence.mean == pytest.approx(float(divergences.mean()), rel=1e-5)
    assert quality.divergence.standard_error == pytest.approx(float(divergences.std()) / 2, rel=1e-5)
    assert (quality.agreement.hits, quality.agreement.images) == (2, 4)
    # Margins 0.5, 0.05, 0.7 and 0.2: three are sure, two of these agree.
    assert (quality.sure_agreement.hits, quality.sure_agreement.images) == (2, 3)
    assert not quality.outputs
    assert quality.is_low


def test_the_same_network_agrees_with_itself_everywhere() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    quality = QualityMeter(network, _batches(torch.randn(7, 3, 2, 2)), synthetic=True).measure(network)
    assert quality.agreement.value == 1
    assert quality.divergence.mean == pytest.approx(0, abs=1e-6)
    assert "7 generated images held back" in str(quality)


def test_a_network_that_gives_nan_agrees_with_nothing() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    broken = _Gives(lambda x: x.new_full((len(x), 5), torch.nan))
    quality = QualityMeter(network, _batches(torch.randn(4, 3, 2, 2)), synthetic=False).measure(broken)
    assert quality.agreement.hits == 0
    assert quality.divergence is None


def test_other_outputs_are_judged_by_the_error_of_each() -> None:
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    noise = 0.1 * torch.randn(5, 3, 4, 4, dtype=torch.float64)
    table = torch.stack([x, x + noise])  # (2, N, 3, 4, 4)

    def gives(row: int) -> nn.Module:
        return _Gives(lambda i: {"image": table[row, i], "features": [table[row, i].mean((2, 3))]})

    original, other, indices = gives(0), gives(1), torch.arange(5)
    quality = QualityMeter(original, _batches(indices, 2), synthetic=False).measure(other)
    image, features = (next(error for error in quality.outputs if key in error.name) for key in ("image", "features"))
    assert image.relative_error == pytest.approx(float(noise.square().sum() / x.square().sum()))
    assert image.r_squared == pytest.approx(1 - float(noise.square().mean() / x.var(correction=0)))
    assert image.psnr is None  # the input is no image of that size
    means, wrong_means = x.mean((2, 3)), (x + noise).mean((2, 3))
    assert features.relative_error == pytest.approx(float((means - wrong_means).square().sum() / means.square().sum()))
    assert quality.agreement is None


def test_an_output_of_the_size_of_the_image_has_a_psnr() -> None:
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    quality = QualityMeter(_Gives(lambda x: x), _batches(x), synthetic=False).measure(_Gives(lambda x: x + 0.1))
    (error,) = quality.outputs
    assert error.name == "output"
    assert error.psnr == pytest.approx(float(20 * torch.log10((x.max() - x.min()) / 0.1)), rel=1e-6)


def test_boxes_that_differ_in_number_are_not_compared() -> None:
    original, other = _Gives(lambda x: [x[:, :, :2]]), _Gives(lambda x: [x[:, :, :1]])
    quality = QualityMeter(original, _batches(torch.randn(2, 3, 4)), synthetic=False).measure(other)
    assert [error.relative_error for error in quality.outputs] == [None]
    assert "other shapes" in str(quality)


def test_features_are_no_classes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    model.num_classes = 0  # type: ignore[assignment] # as timm's models without a head
    quality = QualityMeter(model, _batches(torch.randn(2, 3, 2, 2)), synthetic=False).measure(model)
    assert quality.agreement is None
    assert quality.outputs[0].relative_error == 0
