"""Which layers can be replaced, and how each is read: a registry by exact class that users can extend.

Weight-standardized convolutions (timm) convolve with another weight than the one they store; TensorFlow's "same"
pads by the size of the input. A subclass may do anything in its `forward`, so only exact classes are trusted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import cast

import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from batude_fx.errors import UnsupportedError

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*PLAIN_CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _own_weight(layer: nn.Module) -> Tensor:
    return cast("Tensor", layer.weight)


def _torch_class(layer: nn.Module) -> type[nn.Module]:
    return next(base for base in type(layer).__mro__ if base in _LAYERS)


def _nothing(_layer: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Handler:
    """How the layers of one exact class are read and executed.

    Attributes:
        weight: Gives the effective dense weight, the one the layer really convolves with, in the layer's own layout.
            By default `layer.weight`.
        core: Gives the class of the part that carries stride and padding; its weight is used as it is. By default
            the PyTorch class that the layer derives from.
        weight_flops: What fvcore counts per weight element and call when the effective weight is computed.
        refuse: Gives the reason why a layer cannot be replaced exactly, or None. By default None.
    """

    weight: Callable[[nn.Module], Tensor] = _own_weight
    core: Callable[[nn.Module], type[nn.Module]] = _torch_class
    refuse: Callable[[nn.Module], str | None] = _nothing
    weight_flops: int = 0


_HANDLERS: dict[type[nn.Module], Handler] = {}


def register(layer_type: type[nn.Module], handler: Handler) -> None:
    """Teach batude_fx a class of convolution or linear layer; subclasses of it stay unknown.

    Args:
        layer_type: A subclass of `nn.Conv1d/2d/3d`, `nn.ConvTranspose1d/2d/3d` or `nn.Linear`.
        handler: How its layers are read and executed. It replaces the one registered before, if any.

    Raises:
        UnsupportedError: When `layer_type` derives from none of these.

    Source: the registry of fvcore's `FlopCountAnalysis.set_op_handle`, by class instead of operator.

    Example:
        ```python
        class ScaledConv2d(nn.Conv2d):
            scale = 0.5

            def forward(self, x):
                return self._conv_forward(x, self.scale * self.weight, self.bias)


        batude_fx.register(ScaledConv2d, Handler(weight=lambda layer: layer.scale * layer.weight))
        ```
    """
    if not issubclass(layer_type, _LAYERS):
        names = ", ".join(layer.__name__ for layer in _LAYERS)
        raise UnsupportedError(f"{layer_type.__name__} cannot be registered: it derives from none of {names}.")
    _HANDLERS[layer_type] = handler


def _standardized_weight(layer: nn.Module) -> Tensor:
    """The weight as timm's weight-standardized convolutions compute it in each forward pass."""
    conv = cast("ScaledStdConv2d", layer)
    scaled = isinstance(layer, ScaledStdConv2d | ScaledStdConv2dSame)
    flat = conv.weight.reshape(1, conv.out_channels, -1)  # (1, C_out, C_in / groups * K)
    gain = (conv.gain * conv.scale).view(-1) if scaled else None  # (C_out,)
    return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps).view_as(conv.weight)


def _padded_same(layer: nn.Module) -> type[nn.Module]:
    # TensorFlow's "same" never pads a 1x1 kernel, whatever its stride.
    dynamic = getattr(layer, "same_pad", True) and prod(cast("nn.Conv2d", layer).kernel_size) > 1
    return Conv2dSame if dynamic else nn.Conv2d


def _pointwise_upsampling(layer: nn.Module) -> str | None:
    conv = cast("nn.ConvTranspose2d", layer)
    moved = prod(conv.stride) > 1 or any(conv.padding) or any(conv.output_padding)
    if moved and prod(conv.kernel_size) == 1:
        return "transposed 1x1 kernel with stride or padding: mostly writes zeros, a pair of 1x1 gains nothing"
    return None


for _class in (*PLAIN_CONVOLUTIONS, nn.Linear, TimmLinear, Conv3DSimple, Conv3DNoTemporal):
    register(_class, Handler())
for _class in TRANSPOSED_CONVOLUTIONS:
    register(_class, Handler(refuse=_pointwise_upsampling))
register(Conv2dSame, Handler(core=_padded_same))
# fvcore counts a normalization as 4 flops per element, 5 with a gain.
register(StdConv2d, Handler(weight=_standardized_weight, weight_flops=4))
register(ScaledStdConv2d, Handler(weight=_standardized_weight, weight_flops=5))
register(StdConv2dSame, Handler(weight=_standardized_weight, weight_flops=4, core=_padded_same))
register(ScaledStdConv2dSame, Handler(weight=_standardized_weight, weight_flops=5, core=_padded_same))
register(
    NonDynamicallyQuantizableLinear,
    Handler(refuse=lambda _: "its weight is read by MultiheadAttention, the layer itself is never called"),
)


def skip_reason(layer: nn.Module) -> str | None:
    """Why this layer cannot be replaced exactly, or None when it can.

    A hook on the layer itself is a reason: it was written for the dense layer, and whether it still makes sense on a
    Tucker form only its author knows. Hooks on all other modules, its parents included, are no obstacle.

    Args:
        layer: Any module.
    """
    if is_parametrized(layer):
        return "parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    handler = _HANDLERS.get(type(layer))
    if handler is None:
        return f"no handler for class {type(layer).__name__}; register one with batude_fx.register"
    if reason := user_modification(layer):
        return reason
    if _holds_more(layer):
        return "holds more than a weight and a bias, which its replacement would lose"
    weight = cast("Tensor", layer.weight)
    real = weight.is_floating_point()
    return handler.refuse(layer) if real else f"weight of dtype {weight.dtype}, not a real floating-point one"


def user_modification(module: nn.Module) -> str | None:
    """What a user did to one module that its replacement would not do, or None."""
    if hooks := [name.strip("_") for name in _HOOKS if getattr(module, name)]:
        return f"has {', '.join(hooks).replace('_', ' ')}; remove them to replace it"
    return "its forward method was replaced on the instance" if "forward" in vars(module) else None


def convolves_as_stored(layer: nn.Module) -> bool:
    """Whether a layer can be replaced, and the weight that it stores is the one that it convolves with."""
    return skip_reason(layer) is None and handler_of(layer).weight is _own_weight


def _holds_more(layer: nn.Module) -> bool:
    own = type(layer) in _LAYERS  # subclasses may have further parameters, of which their handlers know
    more = own and (layer._buffers or layer._parameters.keys() - {"weight", "bias"})  # noqa: SLF001
    return bool(more) or any(layer.children())


def handler_of(layer: nn.Module) -> Handler:
    """The handler of a layer's exact class.

    Raises:
        UnsupportedError: When the layer has a `skip_reason`.
    """
    if reason := skip_reason(layer):
        raise UnsupportedError(f"{layer} cannot be replaced exactly: {reason}.")
    return _HANDLERS[type(layer)]


def own_cost(layer: nn.Module) -> tuple[int, int]:
    """Flops of one call besides convolving, as fvcore counts them, and parameters besides weight and bias."""
    known = handler_of(layer)
    elements = cast("Tensor", layer.weight).numel()
    bias = cast("Tensor | None", layer.bias)
    params = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    return known.weight_flops * elements, params - elements - (0 if bias is None else bias.numel())


def canonical_weight(layer: nn.Module) -> Tensor:
    """The effective dense weight, one per group, whatever the layer's own layout.

    Args:
        layer: A convolution or linear layer that has no `skip_reason`.

    Returns:
        (groups, C_out / groups, C_in / groups, k...), detached; it may share memory with the layer.

    Raises:
        UnsupportedError: When the layer has a `skip_reason`.
    """
    return to_canonical(handler_of(layer).weight(layer).detach(), layer)


def canonical_bias(layer: nn.Module) -> Tensor | None:
    """The bias of a convolution or linear layer, (C_out,) and detached, or None."""
    bias = cast("Tensor | None", layer.bias)
    return None if bias is None else bias.detach()


def to_canonical(weight: Tensor, layer: nn.Module) -> Tensor:
    """View of a weight in the layout of `layer` as (groups, out, in, k...)."""
    weight = weight.view(getattr(layer, "groups", 1), -1, *weight.shape[1:])
    return weight.transpose(1, 2) if getattr(layer, "transposed", False) else weight


def from_canonical(weight: Tensor, layer: nn.Module) -> Tensor:
    """Inverse of `to_canonical`."""
    return (weight.transpose(1, 2) if getattr(layer, "transposed", False) else weight).flatten(0, 1)
