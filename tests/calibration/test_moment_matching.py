"""Moment matching: what the sites put out afterwards, measured without the code that matched it."""

import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from batude_fx.calibration.moment_matching import LEAST_GAIN, MOST_GAIN, match_moments_
from batude_fx.graph.surgery import replace_modules
from batude_fx.support.inputs import Inputs
from batude_fx.tucker.decomposition import Factors
from batude_fx.tucker.dense_layers import canonical_weight
from batude_fx.tucker.modules import TuckerModule, tucker_conv
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import weight_spectrum


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), shared, nn.ReLU(), shared, nn.Conv2d(8, 6, 3, groups=2, bias=False)
    ).double()


def _compressed(net: nn.Sequential) -> nn.Sequential:
    ranks = {"0": Ranks(4, 3), "2": Ranks(5, 5), "5": Ranks(3, 2)}
    modules = {}
    for name, site_ranks in ranks.items():
        layer = net.get_submodule(name)
        weight = canonical_weight(layer)
        found = weight_spectrum(weight, pointwise=name == "2").factors(weight, site_ranks)
        bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else weight.new_zeros(6)
        modules[name] = tucker_conv(layer, site_ranks, Factors(found.factor_in, found.core, found.factor_out, bias))
    return replace_modules(net, modules)


def _outputs(net: nn.Module, name: str, images: Tensor) -> list[Tensor]:
    heard: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda _m, _i, output: heard.append(output.detach()))
    net(images)
    handle.remove()
    return heard


def _moments(output: Tensor) -> Tensor:
    return torch.stack([output.mean((0, 2, 3)), output.std((0, 2, 3), correction=0)])


def test_every_site_keeps_its_mean_and_deviation() -> None:
    net, images = _net(), torch.randn(16, 3, 9, 9, dtype=torch.float64)
    small = _compressed(net)
    before = copy.deepcopy(net.state_dict())
    match_moments_(net, small, ["0", "2", "5"], [Inputs((images,))])
    for name in ("0", "2", "5"):
        wanted, got = (_moments(_outputs(model, name, images)[0]) for model in (net, small))
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for model in (net, small) for module in model.modules())


@pytest.mark.parametrize(("factor", "gain"), [(10.0, LEAST_GAIN), (0.01, MOST_GAIN)])
def test_gains_are_bounded(factor: float, gain: float) -> None:
    net, images = _net(), torch.randn(16, 3, 9, 9, dtype=torch.float64)
    small = _compressed(net)
    parts = cast("TuckerModule", small.get_submodule("0")).factors()
    parts.factor_out.mul_(factor)
    faded = _moments(_outputs(small, "0", images)[0])
    match_moments_(net, small, ["0"], [Inputs((images,))])
    mean, deviation = _moments(_outputs(small, "0", images)[0])
    torch.testing.assert_close(deviation, gain * faded[1])
    torch.testing.assert_close(mean, _moments(_outputs(net, "0", images)[0])[0])


def test_a_silent_channel_stays_silent() -> None:
    net, images = _net(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    small = _compressed(net)
    cast("TuckerModule", small.get_submodule("5")).factors().core.zero_()
    match_moments_(net, small, ["5"], [Inputs((images,))])
    assert small(images).isfinite().all()
