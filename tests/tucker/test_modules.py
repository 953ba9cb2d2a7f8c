"""Tucker modules equal the dense layer in float64 over every attribute, and cost what the formula says."""

import copy
from dataclasses import replace
from math import prod
from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from timm.layers.std_conv import ScaledStdConv2d
from torch import Tensor, nn
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from batude_fx.errors import UnsupportedError
from batude_fx.tucker.decomposition import Factors
from batude_fx.tucker.dense_layers import canonical_bias, canonical_weight
from batude_fx.tucker.modules import TuckerConv, TuckerConvTranspose, TuckerLinear, build, tucker_conv
from batude_fx.tucker.ranks import Ranks
from tests.tucker.low_rank_layers import (
    CONVOLUTIONS,
    Case,
    assert_equal,
    assert_same_function,
    convolutions,
    decomposed,
    hosvd,
    set_low_rank_weight,
    timm_convolutions,
)


@given(convolutions())
@settings(max_examples=300, deadline=None)
def test_a_convolution_of_these_ranks_is_reproduced_exactly(case: Case) -> None:
    assert_same_function(case)


@given(timm_convolutions())
@settings(max_examples=200, deadline=None)
def test_a_timm_convolution_of_these_ranks_is_reproduced_exactly(case: Case) -> None:
    assert_same_function(case)


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from([nn.Linear, TimmLinear]), st.data())
@settings(max_examples=40, deadline=None)
def test_a_linear_layer_of_this_rank_is_reproduced_exactly(
    c_in: int, c_out: int, bias: bool, layer_type: type[nn.Linear], data: st.DataObject
) -> None:
    layer = layer_type(c_in, c_out, bias=bias, dtype=torch.float64)
    rank = data.draw(st.integers(1, min(c_in, c_out)))
    set_low_rank_weight(layer, Ranks(rank, rank), seed=c_in)
    small = decomposed(layer, Ranks(rank, rank))
    assert isinstance(small, TuckerLinear)
    assert (small.in_features, small.out_features) == (c_in, c_out)
    for shape in ((c_in,), (3, c_in), (2, 3, c_in)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_equal(small(x), layer(x))
    assert_equal(small.weight, layer.weight)


@pytest.mark.parametrize("layer_type", [Conv3DSimple, Conv3DNoTemporal])
def test_torchvisions_video_convolutions_are_reproduced_exactly(layer_type: type[nn.Conv3d]) -> None:
    layer = layer_type(4, 6, stride=2).double()  # type: ignore[call-arg]
    ranks = Ranks(2, 3)
    set_low_rank_weight(layer, ranks, seed=0)
    assert_same_function(Case(layer, ranks, torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)))


@pytest.mark.parametrize("ranks", [Ranks(8, 2), Ranks(3, 24)])
def test_the_rank_of_an_unfolding_is_exact_for_any_weight(ranks: Ranks) -> None:
    """Two input channels times four taps limit mode 0 to rank 8; three outputs times eight taps limit mode 1 to 24."""
    c_out, c_in, kernel = (20, 2, 4) if ranks.rank_out == 8 else (3, 30, 8)
    layer = nn.Conv1d(c_in, c_out, kernel, padding=1, dtype=torch.float64)
    small = decomposed(layer, ranks)
    x = torch.randn(2, c_in, 12, dtype=torch.float64)
    assert_equal(small(x), layer(x))


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_a_tucker_convolution_has_the_interface_of_the_dense_one(case: Case) -> None:
    layer: Any = case.layer
    small: Any = decomposed(layer, case.ranks)
    assert isinstance(small, TuckerConvTranspose if layer.transposed else TuckerConv)
    names = "in_channels out_channels kernel_size stride padding dilation groups transposed output_padding padding_mode"
    for name in names.split():
        assert getattr(small, name) == getattr(layer, name), name
    assert_equal(small.weight, layer.weight)
    assert small.ranks == case.ranks
    assert (small.bias is None) == (layer.bias is None)
    assert layer.bias is None or torch.equal(cast("Tensor", small.bias), layer.bias)


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_only_the_parts_that_are_needed_exist_and_only_the_last_has_a_bias(case: Case) -> None:
    small, weight = build(case.layer, case.ranks), canonical_weight(case.layer)
    _, c_out, c_in, *kernel = weight.shape
    if prod(kernel) == 1:
        parts = ["factor_in", "factor_out"]
    else:
        parts = ["factor_in"] * (case.ranks.rank_in < c_in) + ["core"] + ["factor_out"] * (case.ranks.rank_out < c_out)
    biases = [f"{parts[-1]}.bias"] if canonical_bias(case.layer) is not None else []
    assert sorted(small.state_dict()) == sorted([*(f"{part}.weight" for part in parts), *biases])


def formula_flops(weight: Tensor, ranks: Ranks, positions_in: int, positions_out: int, *, transposed: bool) -> int:
    """Return the flops of a Tucker form by its formula."""
    groups, c_out, c_in, *kernel = weight.shape
    taps, r_out, r_in = prod(kernel), ranks.rank_out, ranks.rank_in
    if taps == 1:
        return positions_out * groups * r_out * (c_in + c_out)
    first = positions_in * groups * c_in * r_in if r_in < c_in else 0
    last = positions_out * groups * c_out * r_out if r_out < c_out else 0
    return first + (positions_in if transposed else positions_out) * taps * groups * r_in * r_out + last


@given(convolutions())
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore")  # fvcore traces with the deprecated torch.jit
def test_fvcore_counts_what_the_formula_says(case: Case) -> None:
    from fvcore.nn import FlopCountAnalysis

    layer: Any = case.layer
    # fvcore counts nothing for a convolution with a padding named in words and not done by torch's own pad.
    assume(not isinstance(layer.padding, str) or layer.padding_mode != "zeros")
    out = layer(case.x)
    counted = FlopCountAnalysis(build(layer, case.ranks), (case.x,)).unsupported_ops_warnings(enabled=False).total()
    positions = [2 * prod(tensor.shape[2:]) for tensor in (case.x, out)]
    weight = canonical_weight(layer)
    assert counted == formula_flops(weight, case.ranks, *positions, transposed=layer.transposed)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [[13, 14], [2, 5, 13, 14]])
def test_a_transposed_convolution_takes_an_output_size(kernel: int, size: list[int]) -> None:
    stride, padding, side = (3, 1, (5, 5)) if kernel == 3 else (1, 0, (13, 14))
    layer = nn.ConvTranspose2d(4, 5, kernel, stride=stride, padding=padding, dtype=torch.float64)
    ranks = Ranks(2, 2)
    set_low_rank_weight(layer, ranks, seed=0)
    x = torch.randn(2, 4, *side, dtype=torch.float64)
    small = decomposed(layer, ranks)
    assert_equal(small(x, output_size=size), layer(x, output_size=size))
    with pytest.raises(ValueError, match="output size"):
        small(x, output_size=[40, 40])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer_type", [nn.Conv2d, nn.ConvTranspose2d, Conv2dSame, ScaledStdConv2d])
def test_build_keeps_device_dtype_and_flags(device: str, dtype: torch.dtype, layer_type: type[nn.Conv2d]) -> None:
    layer = layer_type(6, 8, 3).to(device, dtype).eval()
    layer.weight.requires_grad_(False)
    before = torch.get_rng_state()
    small = build(layer, Ranks(4, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert {(p.device.type, p.dtype) for p in small.parameters()} == {(device, dtype)}
    assert not any(module.training for module in small.modules())
    assert {name for name, p in small.named_parameters() if p.requires_grad} == {"factor_out.bias"}
    assert build(layer.train(), Ranks(4, 2)).core.training


def test_a_pointwise_same_convolution_needs_no_dynamic_padding() -> None:
    """TensorFlow's "same" padding pads a 3x3 kernel and never a 1x1 kernel."""
    assert type(build(Conv2dSame(4, 6, 1, stride=2), Ranks(2, 2)).factor_in) is nn.Conv2d
    assert type(build(Conv2dSame(4, 6, 3, stride=2), Ranks(2, 2)).core) is Conv2dSame


def test_a_bias_can_be_added_where_the_dense_layer_has_none() -> None:
    layer = nn.Conv2d(4, 6, 3, bias=False, dtype=torch.float64)
    ranks = Ranks(6, 2)  # without `factor_out`: the core is last
    set_low_rank_weight(layer, ranks, seed=0)
    bias = torch.arange(6.0, dtype=torch.float64)
    small = tucker_conv(layer, ranks, hosvd(canonical_weight(layer), ranks, bias))
    assert list(small.state_dict()) == ["factor_in.weight", "core.weight", "core.bias"]
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    assert_equal(small(x), layer(x) + bias.view(-1, 1, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_layers_get_channels_last_parts(dims: int) -> None:
    memory_format = torch.channels_last if dims == 2 else torch.channels_last_3d
    layer = CONVOLUTIONS[dims](12, 8, 3, groups=2, dtype=torch.float64)
    ranks = Ranks(3, 2)
    set_low_rank_weight(layer, ranks, seed=0)
    layer.to(memory_format=memory_format)
    weight = cast("Tensor", decomposed(layer, ranks).core.weight)
    assert weight.is_contiguous(memory_format=memory_format)
    assert not weight.is_contiguous()
    assert_same_function(Case(layer, ranks, torch.randn(2, 12, *(5,) * dims, dtype=torch.float64)))
    assert cast("Tensor", decomposed(nn.Conv2d(4, 4, 3), ranks).core.weight).is_contiguous()


@given(convolutions())
@settings(max_examples=40, deadline=None)
def test_factors_are_read_back_and_are_views(case: Case) -> None:
    factors = hosvd(canonical_weight(case.layer), case.ranks, canonical_bias(case.layer))
    small = tucker_conv(case.layer, case.ranks, factors)
    for name, expected in vars(factors).items():
        actual = getattr(small.factors(), name)
        assert (actual is None) == (expected is None)
        assert expected is None or torch.equal(actual, expected)
    small.load_factors_(Factors(*(None if part is None else 2 * part for part in vars(factors).values())))
    for name, part in vars(small.factors()).items():
        assert part is None or torch.equal(part, 2 * getattr(factors, name))
        assert part is None or not part.requires_grad


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("factor_in", None),
        ("factor_in", torch.zeros(1, 4, 3)),
        ("core", torch.zeros(1, 3, 2, 3)),
        ("factor_out", torch.zeros(1, 3, 6)),
        ("bias", None),
        ("bias", torch.zeros(5)),
    ],
)
def test_factors_that_do_not_fit_are_refused_and_nothing_is_copied(name: str, part: Tensor | None) -> None:
    layer = nn.Conv2d(4, 6, 3)
    good = hosvd(canonical_weight(layer), Ranks(3, 2), canonical_bias(layer))
    small = tucker_conv(layer, Ranks(3, 2), good)
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(UnsupportedError, match=rf"{name} is (missing|\(.*\)) where TuckerConv\(4, 6, .*\) has \("):
        small.load_factors_(replace(good, **{name: part}))
    assert all(torch.equal(small.state_dict()[key], value) for key, value in before.items())


def test_a_superfluous_factor_is_refused() -> None:
    layer = nn.Conv2d(4, 6, 3, bias=False)
    factors = hosvd(canonical_weight(layer), Ranks(6, 2), None)
    with pytest.raises(UnsupportedError, match=r"factor_out is \(1, 6, 6\) where .* has missing"):
        build(layer, Ranks(6, 2)).load_factors_(replace(factors, factor_out=torch.eye(6)[None]))


@pytest.mark.parametrize(
    ("layer", "ranks", "message"),
    [
        (nn.Conv2d(4, 6, 3), Ranks(7, 2), "rank_out is 1 to 6 and rank_in is 1 to 4"),
        (nn.Conv2d(4, 6, 3), Ranks(3, 5), "rank_out is 1 to 6 and rank_in is 1 to 4"),
        (nn.Conv2d(4, 6, 3), Ranks(0, 2), "rank_out is 1 to 6"),
        (nn.Conv2d(4, 6, 3, groups=2), Ranks(4, 2), "rank_out is 1 to 3 and rank_in is 1 to 2"),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), Ranks(3, 3), "rank_out is 1 to 3 and rank_in is 1 to 2"),
        (nn.Conv2d(4, 6, 1), Ranks(6, 4), "a single rank"),
        (nn.Conv2d(4, 6, 1), Ranks(5, 5), "rank_out is 1 to 4 and rank_in is 1 to 4"),
        (nn.Linear(4, 6), Ranks(5, 5), "rank_out is 1 to 4"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(layer: nn.Module, ranks: Ranks, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        build(layer, ranks)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv2d(6, 4, 3, groups=2), "TuckerConv(\n  6, 4, kernel_size=(3, 3), stride=(1, 1), groups=2, "),
        (nn.Linear(6, 4), "TuckerLinear(\n  6, 4, rank=1\n"),
    ],
)
def test_repr_shows_shapes_and_ranks(layer: nn.Module, text: str) -> None:
    assert str(build(layer, Ranks(1, 1))).startswith(text)


def test_a_tucker_module_can_be_traced_and_exported() -> None:
    small = decomposed(nn.Conv2d(4, 6, 3, dtype=torch.float64), Ranks(3, 2)).eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(small)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "factor_in",
        "core",
        "factor_out",
    ]
    assert torch.equal(torch.export.export(small, (x,)).module()(x), small(x))
