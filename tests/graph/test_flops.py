"""Flop and parameter formulas: equal to fvcore's count and to the stored weights, dense and in Tucker form."""

import subprocess
import sys
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batude_fx.errors import DiscoveryError
from batude_fx.graph.discovery import discover
from batude_fx.graph.flops import count_flops, dense_cost, site_cost, tucker_cost
from batude_fx.graph.sites import ConvSite
from batude_fx.graph.surgery import build_skeleton
from batude_fx.support.inputs import Inputs
from batude_fx.tucker.modules import build
from batude_fx.tucker.ranks import Ranks

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Repeat(nn.Module):
    """A network that applies one layer to several inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([self.layer(x).sum() for x in inputs])


def weights_of(module: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in module.named_parameters() if name.endswith("weight"))


def site_of(layer: nn.Module, inputs: tuple[Tensor, ...]) -> ConvSite:
    return discover(Repeat(layer), inputs, layers="conv+linear")[0]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A convolution with any attributes, and one to three inputs of different sizes."""
    dimensions = draw(st.integers(1, 3))
    extents = st.tuples(*[st.integers(1, 3)] * dimensions)
    groups = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    kernel = draw(extents)
    attributes: dict[str, Any] = {
        "stride": draw(extents),
        "padding": draw(st.tuples(*[st.integers(0, 2)] * dimensions)),
        "dilation": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
    }
    if transposed and prod(kernel) == 1:
        attributes |= {"stride": 1, "padding": 0}
    c_in, c_out = (groups * draw(st.integers(2, 5)) for _ in range(2))
    layer_type: type[nn.Module] = (TRANSPOSED if transposed else CONVOLUTIONS)[dimensions]
    layer = layer_type(c_in, c_out, kernel, groups=groups, **attributes)
    sizes = st.tuples(*[st.integers(6, 9)] * dimensions)
    shapes = draw(st.lists(st.tuples(st.integers(1, 3), sizes), min_size=1, max_size=3))
    return layer, tuple(torch.zeros(batch, c_in, *size) for batch, size in shapes)


@st.composite
def linear_layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A linear layer, and one or two inputs with one to three leading axes."""
    c_in, c_out = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    shapes = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=2))
    return nn.Linear(c_in, c_out, bias=draw(st.booleans())), tuple(torch.zeros(*shape, c_in) for shape in shapes)


def draw_ranks(site: ConvSite, data: st.DataObject) -> Ranks:
    full_out, full_in = site.group_out_channels, site.group_in_channels
    if site.is_pointwise:
        rank = data.draw(st.integers(1, min(full_out, full_in)))
        return Ranks(rank, rank)
    return Ranks(data.draw(st.integers(1, full_out)), data.draw(st.integers(1, full_in)))


@settings(max_examples=100, deadline=None)
@given(case=convolutions() | linear_layers(), data=st.data())
def test_formulas_equal_fvcore_to_the_last_flop(case: tuple[Any, tuple[Tensor, ...]], data: st.DataObject) -> None:
    layer, inputs = case
    site = site_of(layer, inputs)
    assert site.calls == len(inputs)
    assert (count_flops(Repeat(layer), Inputs(inputs)), weights_of(layer)) == dense_cost(site) == site_cost(site, None)
    ranks = draw_ranks(site, data)
    replacement = build(layer, ranks)
    expected = count_flops(Repeat(replacement), Inputs(inputs)), weights_of(replacement)
    assert expected == tucker_cost(site, ranks.rank_out, ranks.rank_in) == site_cost(site, ranks)


def conv_site(**changes: Any) -> ConvSite:
    attributes: dict[str, Any] = {"groups": 2, "kernel_size": (3, 3), "transposed": False}
    attributes |= {"positions_in": 100, "positions_out": 25}
    return ConvSite("conv", "Conv2d", 12, 16, calls=1, found_by="fx", **attributes | changes)


@pytest.mark.parametrize(
    ("site", "ranks", "flops", "params"),
    [
        # first 2 * 6 * 3 = 36 weights, core 2 * 9 * 3 * 4 = 216, last 2 * 8 * 4 = 64
        (conv_site(), Ranks(4, 3), 100 * 36 + 25 * 216 + 25 * 64, 36 + 216 + 64),
        (conv_site(transposed=True), Ranks(4, 3), 100 * 36 + 100 * 216 + 25 * 64, 36 + 216 + 64),
        (conv_site(), Ranks(8, 3), 100 * 36 + 25 * 2 * 9 * 3 * 8, 36 + 2 * 9 * 3 * 8),
        (conv_site(), Ranks(4, 6), 25 * 2 * 9 * 6 * 4 + 25 * 64, 2 * 9 * 6 * 4 + 64),
        (conv_site(), Ranks(8, 6), 25 * 2 * 9 * 6 * 8, 2 * 9 * 6 * 8),
        (conv_site(), None, 25 * 2 * 9 * 6 * 8, 2 * 9 * 6 * 8),
        (conv_site(kernel_size=(1, 1)), Ranks(5, 5), 25 * 2 * 5 * (6 + 8), 2 * 5 * (6 + 8)),
        (conv_site(kernel_size=()), None, 25 * 2 * 6 * 8, 2 * 6 * 8),
    ],
)
def test_costs_equal_those_computed_by_hand(site: ConvSite, ranks: Ranks | None, flops: int, params: int) -> None:
    assert site_cost(site, ranks) == (flops, params)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_arrays_of_ranks_cost_what_their_entries_cost(kernel: tuple[int, ...]) -> None:
    site = conv_site(kernel_size=kernel)
    rank_out, rank_in = (axis.ravel() for axis in np.meshgrid(np.arange(1, 9), np.arange(1, 7)))
    if kernel == (1, 1):
        rank_out = rank_in
    flops, params = tucker_cost(site, rank_out, rank_in)
    single = [tucker_cost(site, int(out), int(in_)) for out, in_ in zip(rank_out, rank_in, strict=True)]
    assert list(zip(flops.tolist(), params.tolist(), strict=True)) == single


def test_a_whole_network_costs_what_its_sites_and_the_rest_cost() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    inputs = (torch.zeros(2, 3, 64, 48),)
    sites = discover(model, inputs, layers="conv+linear")
    ranks = {
        site.name: Ranks(*[min(site.in_channels, site.out_channels) // 2] * 2)
        for site in sites
        if min(site.in_channels, site.out_channels) > 3
    }
    assert len(ranks) == 19
    before, after = count_flops(model, Inputs(inputs)), count_flops(build_skeleton(model, ranks), Inputs(inputs))
    saved = [dense_cost(site)[0] - site_cost(site, ranks.get(site.name))[0] for site in sites]
    assert before - after == sum(saved) > 0
    assert before == FlopCountAnalysis(model.eval(), inputs).unsupported_ops_warnings(enabled=False).total()


class Partly(nn.Module):
    """A network that costs more in train mode, is partly in eval mode, and has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.unused = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.train()
        self.unused.eval()
        self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.conv(x)), training=self.training)
        return self.conv(x) if self.training or len(x) > 1 else x


def state_of(model: nn.Module) -> list[object]:
    modules = [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    return [modules, {name: value.tolist() for name, value in model.state_dict().items()}]


def test_counting_is_done_in_eval_mode_and_changes_nothing() -> None:
    model = Partly()
    before = state_of(model)
    assert (
        count_flops(model, Inputs((torch.ones(1, 4, 8, 8),))) == 36 * (4 * 4 * 9) + 2 * 36 * 4
    )  # eval batch-norm: 2 each
    assert state_of(model) == before


def test_a_model_that_cannot_be_counted_is_an_error_and_has_no_hooks_of_fvcore() -> None:
    model = Partly()
    before = state_of(model)
    message = r"fvcore cannot count the flops of Partly.*RuntimeError.*Pass example_inputs= that"
    with pytest.raises(DiscoveryError, match=message) as caught:
        count_flops(model, Inputs((torch.ones(1, 5, 8, 8),)))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert state_of(model) == before


def test_counting_prints_no_warnings() -> None:
    code = """
import sys, warnings
import torch, batude_fx.graph.flops
from batude_fx.support.inputs import Inputs
assert "fvcore" not in sys.modules
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.GELU(), torch.nn.Flatten(0))
    print(batude_fx.graph.flops.count_flops(model, Inputs((torch.ones(1, 4, 4, 4),))))
assert not caught, [str(warning.message) for warning in caught]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stdout, done.stderr) == (0, "576\n", "")
