"""Tucker modules and handlers: equal to the dense layer in float64 for all attributes; flops; refused layers."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from batude_fx.errors import UnsupportedError
from batude_fx.tucker.decomposition import Factors
from batude_fx.tucker.dense_layers import Handler, canonical_bias, canonical_weight, register, skip_reason
from batude_fx.tucker.modules import TuckerConv, TuckerConvTranspose, TuckerLinear, TuckerModule, build, tucker_conv
from batude_fx.tucker.ranks import Ranks

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
TIMM = (Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


@dataclass(frozen=True)
class Case:
    """A dense layer whose effective weight has these Tucker-2 ranks exactly, and an input for it."""

    layer: nn.Module
    ranks: Ranks
    x: Tensor = field(repr=False)


def leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors of a batch of matrices, (groups, rows, rank)."""
    vectors: Tensor = torch.linalg.svd(matrix, full_matrices=True)[0]
    return vectors[:, :, :rank]


def hosvd(weight: Tensor, ranks: Ranks, bias: Tensor | None) -> Factors:
    """Decompose a canonical weight (groups, C_out, C_in, k...) by two singular value decompositions."""
    _, c_out, c_in, *kernel = weight.shape
    left = leading(weight.flatten(2), ranks.rank_out)  # (groups, C_out, r_out)
    right = leading(weight.transpose(1, 2).flatten(2), ranks.rank_in)  # (groups, C_in, r_in)
    if prod(kernel) == 1:
        matrix = weight.flatten(2)
        return Factors(factor_in=(left.mT @ matrix).mT, core=None, factor_out=left, bias=bias)
    drop_out, drop_in = ranks.rank_out == c_out, ranks.rank_in == c_in
    core = weight if drop_out else torch.einsum("goi...,gor->gri...", weight, left)
    core = core if drop_in else torch.einsum("goi...,gir->gor...", core, right)
    return Factors(None if drop_in else right, core, None if drop_out else left, bias)


def set_low_rank_weight(layer: Any, ranks: Ranks, seed: int) -> None:
    """Give the layer a random weight of these Tucker-2 ranks, also after weight standardization.

    Standardization subtracts a mean per output channel; with a column of ones in the input subspace the ranks stay.
    """
    generator = torch.Generator().manual_seed(seed)
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    shape = layer.weight.unflatten(0, (groups, -1)).shape
    c_out, c_in = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    kernel = shape[3:]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    right = normal(groups, c_in, ranks.rank_in)
    right[:, :, 0] = 1
    weight = normal(groups, ranks.rank_out, ranks.rank_in, *kernel)
    if prod(kernel) == 1:
        weight = torch.eye(ranks.rank_out, dtype=torch.float64).expand(groups, -1, -1).reshape(weight.shape)
    weight = torch.einsum("gor...,gir->goi...", weight, right)
    weight = torch.einsum("gri...,gor->goi...", weight, normal(groups, c_out, ranks.rank_out))
    weight = weight.transpose(1, 2) if transposed else weight
    layer.weight.data = weight.flatten(0, 1)
    if layer.bias is not None:
        layer.bias.data = normal(*layer.bias.shape)
    if hasattr(layer, "gain"):
        layer.gain.data = normal(*layer.gain.shape)


@st.composite
def ranks_for(draw: st.DrawFn, c_out: int, c_in: int, *, pointwise: bool) -> Ranks:
    if pointwise:
        rank = draw(st.integers(1, min(c_out, c_in)))
        return Ranks(rank, rank)
    return Ranks(draw(st.integers(1, c_out)), draw(st.integers(1, c_in)))


@st.composite
def paddings(draw: st.DrawFn, kernel: tuple[int, ...], *, same: bool) -> int | tuple[int, ...] | str:
    names = ["valid", "same"] if same else ["valid"]
    each = st.tuples(*(st.integers(0, 2) for _ in kernel))
    padding: int | tuple[int, ...] | str = draw(st.one_of(st.integers(0, 2), each, st.sampled_from(names)))
    return padding


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """Any PyTorch convolution: 1d to 3d, transposed or not, with every attribute that its constructor has."""
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups, c_out, c_in = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    each = st.tuples(*(st.integers(1, 3) for _ in range(dims)))
    kernel, stride = draw(st.one_of(each, st.just((1,) * dims))), draw(each)
    dilation = draw(st.tuples(*(st.integers(1, 2) for _ in range(dims))))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    pointwise = prod(kernel) == 1
    if transposed and pointwise:
        options["stride"] = (1,) * dims
    elif transposed:
        options["padding"] = draw(st.tuples(*(st.integers(0, 1) for _ in kernel)))
        below = (max(pair) - 1 for pair in zip(stride, dilation, strict=True))
        options["output_padding"] = draw(st.tuples(*(st.integers(0, most) for most in below)))
    else:
        options["padding"] = draw(paddings(kernel, same=prod(stride) == 1))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    layer_type = (TRANSPOSED if transposed else CONVOLUTIONS)[dims]
    layer = layer_type(groups * c_in, groups * c_out, kernel, dtype=torch.float64, **options)
    return draw(filled(layer, groups * c_in, dims, draw(ranks_for(c_out, c_in, pointwise=pointwise))))


@st.composite
def timm_convolutions(draw: st.DrawFn) -> Case:
    """timm's subclasses: dynamic "same" padding and weight standardization."""
    groups, c_out, c_in = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    each = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, layer_type = draw(st.one_of(each, st.just((1, 1)))), draw(st.sampled_from(TIMM))
    assume(layer_type is Conv2dSame or c_in * prod(kernel) > 1)  # timm cannot standardize a single number
    options: dict[str, Any] = {
        "stride": draw(st.one_of(each, st.just((1, 1)))),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "padding": draw(st.sampled_from(["same", "valid", ""] if layer_type.__name__.endswith("Same") else [None, 1])),
    }
    layer = layer_type(groups * c_in, groups * c_out, kernel, groups=groups, bias=draw(st.booleans()), **options)
    ranks = draw(ranks_for(c_out, c_in, pointwise=prod(kernel) == 1))
    return draw(filled(layer.double(), groups * c_in, 2, ranks))


@st.composite
def filled(draw: st.DrawFn, layer: nn.Module, channels: int, dims: int, ranks: Ranks) -> Case:
    seed = draw(st.integers(0, 99))
    set_low_rank_weight(layer, ranks, seed)
    space = draw(st.tuples(*(st.integers(5, 7) for _ in range(dims))))
    x = torch.randn(2, channels, *space, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return Case(layer.requires_grad_(False), ranks, x)


def decomposed(layer: nn.Module, ranks: Ranks) -> TuckerModule:
    return tucker_conv(layer, ranks, hosvd(canonical_weight(layer), ranks, canonical_bias(layer)))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_same_function(case: Case) -> None:
    small = decomposed(case.layer, case.ranks)
    assert_equal(small(case.x), case.layer(case.x))
    assert_equal(small(case.x[0]), case.layer(case.x[0]))  # without a batch dimension


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
def test_torchvisions_video_convolutions(layer_type: type[nn.Conv3d]) -> None:
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


class Halved(nn.Conv2d):
    """A class as a user may write it, which convolves with half of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self._conv_forward(x, self.weight / 2, self.bias))


def test_a_class_of_the_user_is_unknown_until_registered() -> None:
    layer = Halved(4, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64)
    assert skip_reason(layer) == "no handler for class Halved; register one with batude_fx.register"
    with pytest.raises(UnsupportedError, match="no handler for class Halved"):
        build(layer, Ranks(1, 1))

    class Registered(Halved):
        pass

    class Child(Registered):
        pass

    register(Registered, Handler(weight=lambda module: module.weight.div(2)))
    layer = Registered(4, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64)
    set_low_rank_weight(layer, Ranks(2, 2), seed=0)
    assert_same_function(Case(layer, Ranks(2, 2), torch.randn(2, 4, 5, 6, dtype=torch.float64)))
    assert "no handler for class Child" in str(skip_reason(Child(4, 6, 3)))


def test_only_convolutions_and_linear_layers_can_be_registered() -> None:
    with pytest.raises(UnsupportedError, match=r"ReLU cannot be registered: it derives from none of Conv1d, .*Linear"):
        register(nn.ReLU, Handler())


def with_forward_hook() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_state_dict_hook() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    layer.register_state_dict_post_hook(lambda *_: None)  # type: ignore[no-untyped-call]
    return layer


def with_other_forward() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    layer.__dict__["forward"] = lambda x: x
    return layer


def pruned() -> nn.Module:
    return cast("nn.Module", prune.l1_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.5))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nn.ReLU, "no handler for class ReLU"),
        (lambda: nn.LazyConv2d(4, 3), "no handler for class LazyConv2d"),
        (with_forward_hook, "has forward hooks; remove them"),
        (with_state_dict_hook, "has state dict hooks; remove them"),
        (with_other_forward, "forward method was replaced"),
        (pruned, "has forward pre hooks"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), "remove_parametrizations"),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, "read by MultiheadAttention"),
        (lambda: nn.ConvTranspose2d(4, 6, 1, stride=2), "transposed 1x1 kernel"),
        (lambda: nn.ConvTranspose1d(4, 6, 1, padding=1), "transposed 1x1 kernel"),
        (lambda: nn.Conv2d(4, 6, 3, dtype=torch.complex64), r"dtype torch\.complex64"),
    ],
)
def test_layers_that_cannot_be_replaced_exactly_have_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    layer = make()
    text = skip_reason(layer)
    assert text is not None
    assert re.search(reason, text)
    with pytest.raises(UnsupportedError, match=reason):
        canonical_weight(layer)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3), nn.ConvTranspose1d(4, 6, 1), nn.Linear(4, 6), nn.Conv3d(1, 1, 1)]
)
def test_plain_layers_have_no_reason(layer: nn.Module) -> None:
    assert skip_reason(layer) is None


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
