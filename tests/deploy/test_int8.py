"""Equalization changes ranges and nothing else."""

import pytest
import torch
from torch import nn

import batude_fx
from batude_fx import Ranks
from batude_fx.deploy.int8 import _pairs, equalize_
from batude_fx.support.inputs import Inputs
from batude_fx.tucker.dense_layers import canonical_bias, canonical_weight, to_canonical
from batude_fx.tucker.modules import TuckerModule, tucker_conv
from batude_fx.tucker.spectra import weight_spectrum

LAYERS = {
    "conv": (nn.Conv2d(8, 12, 3, padding=1), Ranks(5, 4), (2, 8, 6, 6)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2), Ranks(3, 2), (2, 8, 6, 6)),
    "pointwise": (nn.Conv2d(8, 12, 1, stride=2), Ranks(3, 3), (2, 8, 6, 6)),
    "transposed": (nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2), Ranks(3, 2), (2, 8, 6, 6)),
    "1d": (nn.Conv1d(8, 12, 3), Ranks(5, 8), (2, 8, 9)),
    "linear": (nn.Linear(8, 12), Ranks(3, 3), (2, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_equalization_keeps_outputs_and_balances_ranges(name: str) -> None:
    layer, ranks, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = layer.double()
    weight = canonical_weight(layer)
    pointwise = all(extent == 1 for extent in weight.shape[3:])
    factors = weight_spectrum(weight, pointwise=pointwise).factors(weight, ranks)
    form = tucker_conv(
        layer, ranks, batude_fx.tucker.decomposition.Factors(**{**vars(factors), "bias": canonical_bias(layer)})
    )
    network, x = nn.Sequential(form).eval(), torch.randn(shape, dtype=torch.float64)
    expected = network(x)
    equalize_(network, [Inputs((x,))])
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)

    seen: dict[nn.Module, torch.Tensor] = {}
    for first, _ in _pairs(form):
        first.register_forward_hook(lambda module, _args, output: seen.__setitem__(module, output))
    network(x)
    *_, (first, second) = _pairs(form)  # a pair before it has its weights scaled once more
    axis = 1 if getattr(first, "kernel_size", ()) else -1
    activations = seen[first].abs().movedim(axis, 0).flatten(1).amax(1)
    weights = to_canonical(second.weight, second).abs().transpose(1, 2).flatten(2).amax(2).flatten()
    torch.testing.assert_close(activations, weights)  # SmoothQuant, equation 4 with alpha 0.5


@torch.no_grad()
def test_channels_of_zeros_and_modules_that_nothing_passes_stay_finite() -> None:
    layer = nn.Conv2d(4, 6, 1)
    form = batude_fx.tucker.modules.build(layer, Ranks(2, 2))
    for parameter in form.parameters():
        parameter.zero_()
    network = nn.Sequential(form)
    equalize_(network, [Inputs((torch.randn(1, 4, 3, 3),))])
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert isinstance(network[0], TuckerModule)
    before = network[0].factor_in.weight.clone()
    equalize_(network, [])
    assert torch.equal(before, network[0].factor_in.weight)
