"""Layers whose weight has Tucker-2 ranks that are known, with every attribute, and their exact Tucker modules."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from batude_fx.tucker.decomposition import Factors
from batude_fx.tucker.dense_layers import canonical_bias, canonical_weight
from batude_fx.tucker.modules import TuckerModule, tucker_conv
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
    """Ranks that a layer of these channels can have."""
    if pointwise:
        rank = draw(st.integers(1, min(c_out, c_in)))
        return Ranks(rank, rank)
    return Ranks(draw(st.integers(1, c_out)), draw(st.integers(1, c_in)))


@st.composite
def paddings(draw: st.DrawFn, kernel: tuple[int, ...], *, same: bool) -> int | tuple[int, ...] | str:
    """A padding as a number, one for each axis, or a word."""
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
    """The layer with a weight of these ranks, and an input with this many axes of space."""
    seed = draw(st.integers(0, 99))
    set_low_rank_weight(layer, ranks, seed)
    space = draw(st.tuples(*(st.integers(5, 7) for _ in range(dims))))
    x = torch.randn(2, channels, *space, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return Case(layer.requires_grad_(False), ranks, x)


def decomposed(layer: nn.Module, ranks: Ranks) -> TuckerModule:
    """Return the Tucker module of the layer at these ranks, by HOSVD."""
    return tucker_conv(layer, ranks, hosvd(canonical_weight(layer), ranks, canonical_bias(layer)))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Check that two float64 tensors are equal up to 1e-10."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_same_function(case: Case) -> None:
    """Check that the Tucker module computes what the dense layer does, with a batch axis and without."""
    small = decomposed(case.layer, case.ranks)
    assert_equal(small(case.x), case.layer(case.x))
    assert_equal(small(case.x[0]), case.layer(case.x[0]))  # without a batch dimension
