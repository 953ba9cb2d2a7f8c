"""Layers in Tucker-2 form, with the interface of the dense layers that they replace.

A convolution becomes `factor_in` (1x1), `core` (k x k) and `factor_out` (1x1). A part that is not needed, such as the
factor of a full rank, is an `nn.Identity` and has no key in the `state_dict`. Stride, padding, padding mode, dilation
and output padding belong to one part only: the core, or `factor_in` of a pointwise layer, which has no core.

Source: Y.-D. Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", ICLR 2016, https://arxiv.org/abs/1511.06530, section 3. Added here: grouped convolutions (one
decomposition per group), transposed ones, and weight-standardized ones, whose standardized weight is decomposed.
"""

from functools import partial
from math import prod
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from batude_fx.errors import UnsupportedError
from batude_fx.tucker.decomposition import Factors
from batude_fx.tucker.dense_layers import (
    PLAIN_CONVOLUTIONS,
    canonical_bias,
    from_canonical,
    handler_of,
    to_canonical,
)
from batude_fx.tucker.ranks import Ranks

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Number of axes of a tensor to its channels-last memory format."""


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is channels-last in memory, and not contiguous in the default format as well."""
    memory_format = CHANNELS_LAST.get(tensor.ndim)
    if memory_format is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=memory_format)


class TuckerModule(nn.Module):
    """A layer in Tucker-2 form; made by `build` or `tucker_conv`.

    Attributes:
        factor_in: C_in to groups * r_in channels; `nn.Identity` where mode 1 keeps its full rank.
        core: groups * r_in to groups * r_out channels; `nn.Identity` at a pointwise layer.
        factor_out: groups * r_out to C_out channels; `nn.Identity` where mode 0 keeps its full rank.
        groups: Number of groups, the same in all parts.
        kernel_size: Kernel size of the dense layer; `()` for a linear layer.
        transposed: Whether the dense layer is a transposed convolution.
    """

    # Properties that torch.jit.script must not compile.
    __jit_unused_properties__: ClassVar = ["weight", "bias", "ranks", "_carrier", "last"]

    def __init__(self, factor_in: nn.Module, core: nn.Module, factor_out: nn.Module) -> None:
        super().__init__()
        self.factor_in = factor_in
        self.core = core
        self.factor_out = factor_out
        self.groups: int = getattr(self._carrier, "groups", 1)
        self.kernel_size: tuple[int, ...] = getattr(self._carrier, "kernel_size", ())
        self.transposed: bool = getattr(self._carrier, "transposed", False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's layers call it
        """Apply the three parts: (N, C_in, in...) to (N, C_out, out...)."""
        x = self.factor_in(input)  # (N, groups * r_in, in...), at a pointwise layer (N, groups * r, out...)
        x = self.core(x)  # (N, groups * r_out, out...)
        output: Tensor = self.factor_out(x)  # (N, C_out, out...)
        return output

    @property
    def weight(self) -> Tensor:
        """The product of the parts, in the layout of the dense layer's weight; computed at each access."""
        dense = from_canonical(_compose(self._parts()), self)
        return dense.reshape(*dense.shape[:2], *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """The bias, (C_out,), a parameter of the last part; or None."""
        return cast("Tensor | None", self.last.bias)

    @property
    def ranks(self) -> Ranks:
        """The Tucker-2 ranks, per group."""
        parts = self._parts()
        if parts.core is not None:
            return Ranks(rank_out=parts.core.shape[1], rank_in=parts.core.shape[2])
        rank = cast("Tensor", parts.factor_in).shape[2]
        return Ranks(rank_out=rank, rank_in=rank)

    def factors(self) -> Factors:
        """Return the parts as tensors: detached views, so that writing to them changes this module."""
        parts = vars(self._parts())
        return Factors(**{name: None if part is None else part.detach() for name, part in parts.items()})

    def load_factors_(self, factors: Factors) -> None:
        """Copy tensors into the parts, converted to their dtype and device.

        Raises:
            UnsupportedError: When a part is missing, superfluous or of another shape; then nothing is copied.
        """
        pairs = [(name, getattr(factors, name), part) for name, part in vars(self.factors()).items()]
        for name, new, part in pairs:
            new_shape, shape = _describe_shape(new), _describe_shape(part)
            if new_shape != shape:
                raise UnsupportedError(
                    f"{name} is {new_shape} where {type(self).__name__}({self.extra_repr()}) has {shape}; "
                    "build the module with the ranks of these factors."
                )
        for _, new, part in pairs:
            if part is not None:
                part.copy_(new)

    @property
    def _carrier(self) -> nn.Module:
        """The part that has the kernel, stride and padding of the dense layer."""
        return self.factor_in if isinstance(self.core, nn.Identity) else self.core

    @property
    def last(self) -> nn.Module:
        """The part that has the bias and the output channels of the dense layer."""
        return self.core if isinstance(self.factor_out, nn.Identity) else self.factor_out

    def _parts(self) -> Factors:
        """Return the parameters as views in canonical form."""
        factor_in, core, factor_out = (
            None if isinstance(part, nn.Identity) else to_canonical(cast("Tensor", part.weight), part)
            for part in (self.factor_in, self.core, self.factor_out)
        )
        return Factors(
            factor_in=None if factor_in is None else factor_in.view(factor_in.shape[:3]).mT,
            core=core,
            factor_out=None if factor_out is None else factor_out.view(factor_out.shape[:3]),
            bias=self.bias,
        )


class TuckerConv(TuckerModule):
    """A convolution in Tucker-2 form, with the attributes of the `nn.Conv1d/2d/3d` it replaces."""

    def __init__(self, factor_in: nn.Module, core: nn.Module, factor_out: nn.Module) -> None:
        super().__init__(factor_in, core, factor_out)
        first = cast("nn.Conv2d", self.core if isinstance(factor_in, nn.Identity) else factor_in)
        carrier = cast("nn.Conv2d", self._carrier)
        self.in_channels = first.in_channels
        self.out_channels = cast("nn.Conv2d", self.last).out_channels
        self.stride = carrier.stride
        self.padding = carrier.padding
        self.dilation = carrier.dilation
        self.output_padding = carrier.output_padding
        self.padding_mode = carrier.padding_mode

    def extra_repr(self) -> str:
        """Channels, kernel, stride, groups and ranks."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, rank_out={self.ranks.rank_out}, rank_in={self.ranks.rank_in}"
        )


class TuckerConvTranspose(TuckerConv):
    """A transposed convolution in Tucker-2 form, with the attributes of the `nn.ConvTranspose1d/2d/3d` it replaces."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 - as torch does
        """Apply the three parts: (N, C_in, in...) to (N, C_out, out...), where `out` is `output_size` if given."""
        if isinstance(self.core, nn.Identity):
            x = self.factor_in(input, output_size)  # (N, groups * r, out...)
        else:
            x = self.factor_in(input)  # (N, groups * r_in, in...)
            x = self.core(x, output_size)  # (N, groups * r_out, out...)
        return cast("Tensor", self.factor_out(x))  # (N, C_out, out...)


class TuckerLinear(TuckerModule):
    """A linear layer in Tucker-2 form, two linear layers, with the attributes of the `nn.Linear` it replaces."""

    def __init__(self, factor_in: nn.Module, core: nn.Module, factor_out: nn.Module) -> None:
        super().__init__(factor_in, core, factor_out)
        self.in_features = cast("nn.Linear", factor_in).in_features
        self.out_features = cast("nn.Linear", factor_out).out_features

    def extra_repr(self) -> str:
        """Features and rank."""
        return f"{self.in_features}, {self.out_features}, rank={self.ranks.rank_out}"


def build(layer: nn.Module, ranks: Ranks, *, add_bias: bool = False) -> TuckerModule:
    """Build the Tucker form of a layer, with uninitialised weights, on the layer's device and in its dtype.

    The `training` flag, `requires_grad` and a channels-last memory format are those of the layer. No random numbers
    are drawn.

    Args:
        layer: A convolution or linear layer that has no `skip_reason`; it may be on the meta device.
        ranks: Per group. A full rank leaves out its factor; at two full ranks the core is the dense layer. At a
            pointwise layer both ranks are equal.
        add_bias: Whether the Tucker form has a bias even where the layer has none.

    Raises:
        UnsupportedError: When the layer has a `skip_reason`, or the ranks do not fit it.
    """
    core_type = handler_of(layer).core(layer)
    _check_ranks(layer, ranks)
    bias = add_bias or canonical_bias(layer) is not None
    if isinstance(layer, nn.Linear):
        module: TuckerModule = TuckerLinear(
            _empty(core_type, layer, layer.in_features, ranks.rank_in, bias=False),
            nn.Identity(),
            _empty(nn.Linear, layer, ranks.rank_out, layer.out_features, bias=bias),
        )
    else:
        module = _build_conv(cast("nn.Conv2d", layer), core_type, ranks, bias=bias)
    _copy_settings_(module, layer)
    return module


def tucker_conv(layer: nn.Module, ranks: Ranks, factors: Factors) -> TuckerModule:
    """Build the Tucker form of a layer and load the given factors into it.

    Raises:
        UnsupportedError: When the layer has a `skip_reason`, or ranks, factors and layer do not fit each other.
    """
    module = build(layer, ranks, add_bias=factors.bias is not None)
    module.load_factors_(factors)
    return module


def _build_conv(conv: nn.Conv2d, core_type: type[nn.Module], ranks: Ranks, *, bias: bool) -> TuckerConv:
    one_by_one = partial(_empty, PLAIN_CONVOLUTIONS[len(conv.kernel_size) - 1], conv, kernel_size=1, groups=conv.groups)
    spatial = partial(_empty, core_type, conv, kernel_size=conv.kernel_size, **_spatial_arguments(conv))
    tucker_class = TuckerConvTranspose if conv.transposed else TuckerConv
    c_in, c_out = conv.in_channels, conv.out_channels
    r_in, r_out = conv.groups * ranks.rank_in, conv.groups * ranks.rank_out
    if prod(conv.kernel_size) == 1:
        # Stride and padding come first, so that both parts run on the smaller output.
        return tucker_class(spatial(c_in, r_in, bias=False), nn.Identity(), one_by_one(r_out, c_out, bias=bias))
    # Only the last part has a bias: a bias before the core would be missing from the zeros that the core pads with.
    return tucker_class(
        nn.Identity() if r_in == c_in else one_by_one(c_in, r_in, bias=False),
        spatial(r_in, r_out, bias=bias and r_out == c_out),
        nn.Identity() if r_out == c_out else one_by_one(r_out, c_out, bias=bias),
    )


def _spatial_arguments(conv: nn.Conv2d) -> dict[str, object]:
    """Return the constructor arguments, besides the kernel size, that determine where the kernel is applied."""
    names = ["stride", "padding", "dilation", "groups"]
    # Constructors of subclasses take only the arguments that they need.
    names += ["padding_mode"] * (conv.padding_mode != "zeros") + ["output_padding"] * conv.transposed
    return {name: getattr(conv, name) for name in names}


def _empty(layer_type: type[nn.Module], like: nn.Module, *args: object, **kwargs: object) -> nn.Module:
    """Construct a layer without initialisation, with the device and dtype of the weight of `like`."""
    weight = cast("Tensor", like.weight)
    with torch.device("meta"):
        layer = layer_type(*args, **kwargs)
    return layer.to(weight.dtype).to_empty(device=weight.device)


def _copy_settings_(module: TuckerModule, layer: nn.Module) -> None:
    weight, bias = cast("Tensor", layer.weight), cast("Tensor | None", layer.bias)
    module.train(layer.training).requires_grad_(weight.requires_grad)
    if bias is not None:
        cast("Tensor", module.bias).requires_grad_(bias.requires_grad)
    if is_channels_last(weight):
        module.to(memory_format=CHANNELS_LAST[weight.ndim])


def _check_ranks(layer: nn.Module, ranks: Ranks) -> None:
    _, full_out, full_in, *kernel = to_canonical(cast("Tensor", layer.weight), layer).shape
    if prod(kernel) == 1:
        full_out = full_in = min(full_out, full_in)
        if ranks.rank_out != ranks.rank_in:
            raise UnsupportedError(f"{ranks} do not fit {layer}: a pointwise layer has a single rank; make them equal.")
    if not (1 <= ranks.rank_out <= full_out and 1 <= ranks.rank_in <= full_in):
        raise UnsupportedError(
            f"{ranks} do not fit {layer}: per group, rank_out is 1 to {full_out} and rank_in is 1 to {full_in}."
        )


def _compose(factors: Factors) -> Tensor:
    """Multiply factors out to the dense weight (groups, C_out, C_in, k...)."""
    factor_in, core, factor_out = factors.factor_in, factors.core, factors.factor_out
    if core is None:
        return cast("Tensor", factor_out) @ cast("Tensor", factor_in).mT
    if factor_in is not None:
        core = torch.einsum("goi...,gci->goc...", core, factor_in)
    if factor_out is not None:
        core = torch.einsum("goi...,gco->gci...", core, factor_out)
    return core


def _describe_shape(part: Tensor | None) -> str:
    return "missing" if part is None else str(tuple(part.shape))
