"""Each site is cut alone, its loss is the best of its options, and what is measured is the divergence then."""

import pytest
import torch
from torch import Tensor, nn

import batude_fx
from batude_fx.compression.sensitivity import Sensitivity, SiteSensitivity
from batude_fx.graph.flops import site_cost
from batude_fx.quality.comparison import QualityMeter
from batude_fx.support.inputs import Inputs
from batude_fx.tucker.ranks import Ranks
from tests.compression.common import EXAMPLE


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 5)).eval()


def _images() -> Tensor:
    return torch.randn(80, *EXAMPLE.shape[1:], generator=torch.Generator().manual_seed(1))


def test_each_site_is_cut_alone() -> None:
    model, images = _network(), _images()
    plan = batude_fx.plan(model, "1TFLOPs", example_inputs=EXAMPLE, calibration=images, round_to=1)
    found = plan.sensitivity(model, measured=1)
    sites = {site.name: site for site in plan.sites}
    assert [site.name for site in found.sites] == ["2", "4", "0"]  # the most expensive ones first
    assert [site.measured is None for site in found.sites] == [False, True, True]
    first = found.sites[0]
    assert site_cost(sites["2"], Ranks(*first.ranks))[0] <= first.flops / 2
    assert first.predicted[0] < first.predicted[1] < first.predicted[2]

    fixed = {"2": Ranks(*first.ranks), "0": None, "4": None}
    cut = batude_fx.plan(model, "1TFLOPs", example_inputs=EXAMPLE, calibration=images, round_to=1, ranks=fixed)
    held_back = [Inputs((images[4::5],))]
    quality = QualityMeter(model, held_back, synthetic=False).measure(cut.apply(model))
    assert first.measured == pytest.approx(quality.divergence.mean, rel=1e-6)
    assert "each site cut alone" in str(found)


def test_nothing_is_measured_without_images() -> None:
    model = _network()
    plan = batude_fx.plan(model, "1TFLOPs", example_inputs=EXAMPLE, calibration=None, round_to=1)
    assert all(site.measured is None for site in plan.sensitivity(model).sites)


def _site(predicted: float, measured: float | None) -> SiteSensitivity:
    return SiteSensitivity(name="a", flops=1, predicted=(0.0, predicted, 0.0), ranks=None, measured=measured)


def test_the_correlation_is_spearmans() -> None:
    pairs = [(0.1, 3.0), (0.2, 1.0), (0.3, 4.0), (0.9, 2.0), (1.5, 5.0)]
    sites = (*(_site(*pair) for pair in pairs), _site(9.0, None))
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 2, 1, 1, 2, 0
    assert Sensitivity("A", sites).rank_correlation == pytest.approx(1 - 6 * 10 / (5 * 24))
    assert Sensitivity("A", sites[:2]).rank_correlation is None


def test_equal_values_share_their_places() -> None:
    tied = tuple(_site(*pair) for pair in [(1.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)])
    places, others = torch.tensor([[1.5, 1.5, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    expected = float(torch.corrcoef(torch.stack([places, others]))[0, 1])
    assert Sensitivity("A", tied).rank_correlation == pytest.approx(expected)
    assert Sensitivity("A", tuple(_site(1.0, value) for value in (1.0, 2.0, 3.0))).rank_correlation is None
