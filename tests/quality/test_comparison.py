"""The figures of quality are those of closed formulas, scipy's distances and plain counting."""

from collections import OrderedDict
from dataclasses import dataclass
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
    assert [error.problem for error in quality.outputs] == ["other shapes"]
    assert "other shapes" in str(quality)


def test_features_are_no_classes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    model.num_classes = 0  # type: ignore[assignment] # as timm's models without a head
    quality = QualityMeter(model, _batches(torch.randn(2, 3, 2, 2)), synthetic=False).measure(model)
    assert quality.agreement is None
    assert quality.outputs[0].relative_error == 0


class _Named(OrderedDict[str, Any]):
    """Outputs with names, as transformers' `ModelOutput`; torch's pytrees know no keys of it."""


def test_outputs_may_be_in_mappings_and_dataclasses() -> None:
    @dataclass
    class Pair:
        first: Tensor
        second: None = None

    model = _Gives(lambda x: _Named(loss=None, pair=Pair(x), listed=[x, (x,)]))
    quality = QualityMeter(model, _batches(torch.randn(4, 3, 2, 2)), synthetic=False).measure(model)
    assert quality is not None
    assert [error.name for error in quality.outputs] == ["listed.0", "listed.1.0", "pair.first"]


def test_values_that_are_not_finite_are_named_and_warned_of() -> None:
    original, broken = _Gives(lambda x: x), _Gives(lambda x: x * torch.nan)
    quality = QualityMeter(original, _batches(torch.randn(4, 3, 2, 2)), synthetic=False).measure(broken)
    assert "not finite" in str(quality)
    assert quality.is_low


def test_an_output_that_is_mostly_error_is_low() -> None:
    original, other = _Gives(lambda x: x), _Gives(lambda x: -x)
    quality = QualityMeter(original, _batches(torch.randn(4, 3, 2, 2)), synthetic=False).measure(other)
    assert quality.outputs[0].relative_error == pytest.approx(4)
    assert quality.is_low


def test_labels_are_equal_or_not() -> None:
    x = torch.randn(4, 3, 2, 2)
    original, other = _Gives(lambda x: (x > 0).long()), _Gives(lambda x: (x[:, [0, 0, 0]] > 0).long())
    quality = QualityMeter(original, _batches(x), synthetic=False).measure(other)
    assert quality.outputs[0].equal == pytest.approx(float(((x > 0) == (x[:, [0, 0, 0]] > 0)).float().mean()))
    assert "of the values equal" in str(quality)


def test_probabilities_are_not_normalized_again() -> None:
    scores = torch.randn(6, 2, 5)
    logits = QualityMeter(_Gives(lambda x: x[:, 0]), _batches(scores), synthetic=False)
    probabilities = QualityMeter(_Gives(lambda x: x[:, 0].softmax(1)), _batches(scores), synthetic=False)
    by_logits = logits.measure(_Gives(lambda x: x[:, 1]))
    by_probabilities = probabilities.measure(_Gives(lambda x: x[:, 1].softmax(1)))
    assert by_probabilities.divergence.mean == pytest.approx(by_logits.divergence.mean, rel=1e-4)
    assert by_probabilities.sure_agreement == by_logits.sure_agreement


def test_nothing_to_compare_is_no_quality() -> None:
    model = _Gives(lambda _: None)
    assert QualityMeter(model, _batches(torch.randn(2, 3)), synthetic=False).measure(model) is None
    assert QualityMeter(_Gives(lambda x: x), [], synthetic=False).measure(_Gives(lambda x: x)) is None


def test_runs_of_several_images_count_once() -> None:
    model = _Gives(lambda images: [image[None] for image in images])
    batches = [Inputs(([torch.randn(3, 4, 4)],)) for _ in range(4)]
    assert QualityMeter(model, batches, synthetic=True).measure(model).images == 4


def test_one_image_has_no_interval_of_its_divergence() -> None:
    model = _Gives(lambda x: x)
    quality = QualityMeter(model, _batches(torch.randn(1, 5)), synthetic=False).measure(model)
    assert quality.divergence is None
