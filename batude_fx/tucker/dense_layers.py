"""The layers that can be replaced, and how their weights are read: a registry of exact classes, which users can extend.

A class is registered with a `Handler`, because a layer may compute something else than its base class does: timm's
weight-standardized convolutions convolve with another weight than the one they store, and its "same" convolutions pad
by the size of the input. A subclass may do anything in its `forward`, so it is not replaced unless it is registered.
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


def _stored_weight(layer: nn.Module) -> Tensor:
    return cast("Tensor", layer.weight)


def _torch_class(layer: nn.Module) -> type[nn.Module]:
    return next(base for base in type(layer).__mro__ if base in _LAYERS)


def _never_refuse(_layer: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Handler:
    """How to replace the layers of one exact class: which weight to decompose, and which class executes the core.

    Attributes:
        weight: Maps a layer to its effective weight, the one it convolves with, in the shape of `layer.weight`. By
            default `layer.weight` itself.
        core: Maps a layer to the class of the replacement's part that has its kernel, stride and padding. This class
            must convolve with its weight as it is stored. By default the PyTorch class that the layer derives from.
        refuse: Maps a layer to the reason why it cannot be replaced exactly, or to None where it can. By default None.
        weight_flops: Flops per weight element and call that fvcore counts for computing the effective weight.
    """

    weight: Callable[[nn.Module], Tensor] = _stored_weight
    core: Callable[[nn.Module], type[nn.Module]] = _torch_class
    refuse: Callable[[nn.Module], str | None] = _never_refuse
    weight_flops: int = 0


_HANDLERS: dict[type[nn.Module], Handler] = {}


def register(layer_type: type[nn.Module], handler: Handler) -> None:
    """Register a class of convolution or linear layers, so that they can be replaced; its subclasses are not included.

    Args:
        layer_type: A subclass of `nn.Conv1d/2d/3d`, `nn.ConvTranspose1d/2d/3d` or `nn.Linear`.
        handler: How to replace layers of this class. It supersedes a handler that was registered for it before.

    Raises:
        UnsupportedError: When `layer_type` is no such subclass.

    Source: fvcore's `FlopCountAnalysis.set_op_handle`, which registers operators instead of classes.

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
    """Return the weight that timm's weight-standardized convolutions compute in each forward pass."""
    conv = cast("ScaledStdConv2d", layer)
    scaled = isinstance(layer, ScaledStdConv2d | ScaledStdConv2dSame)
    flat = conv.weight.reshape(1, conv.out_channels, -1)  # (1, C_out, C_in / groups * K)
    gain = (conv.gain * conv.scale).view(-1) if scaled else None  # (C_out,)
    return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps).view_as(conv.weight)


def _same_padding_class(layer: nn.Module) -> type[nn.Module]:
    # TensorFlow's "same" never pads a 1x1 kernel, whatever its stride.
    dynamic = getattr(layer, "same_pad", True) and prod(cast("nn.Conv2d", layer).kernel_size) > 1
    return Conv2dSame if dynamic else nn.Conv2d


def _refuse_strided_pointwise(layer: nn.Module) -> str | None:
    conv = cast("nn.ConvTranspose2d", layer)
    resizes = prod(conv.stride) > 1 or any(conv.padding) or any(conv.output_padding)
    if resizes and prod(conv.kernel_size) == 1:
        return "transposed 1x1 kernel with stride or padding: mostly writes zeros, a pair of 1x1 gains nothing"
    return None


for _class in (*PLAIN_CONVOLUTIONS, nn.Linear, TimmLinear, Conv3DSimple, Conv3DNoTemporal):
    register(_class, Handler())
for _class in TRANSPOSED_CONVOLUTIONS:
    register(_class, Handler(refuse=_refuse_strided_pointwise))
register(Conv2dSame, Handler(core=_same_padding_class))
# fvcore counts a normalization as 4 flops per element, 5 with a gain.
register(StdConv2d, Handler(weight=_standardized_weight, weight_flops=4))
register(ScaledStdConv2d, Handler(weight=_standardized_weight, weight_flops=5))
register(StdConv2dSame, Handler(weight=_standardized_weight, weight_flops=4, core=_same_padding_class))
register(ScaledStdConv2dSame, Handler(weight=_standardized_weight, weight_flops=5, core=_same_padding_class))
register(
    NonDynamicallyQuantizableLinear,
    Handler(refuse=lambda _: "its weight is read by MultiheadAttention, the layer itself is never called"),
)


def skip_reason(layer: nn.Module) -> str | None:
    """Return the reason why a layer cannot be replaced exactly, or None when it can.

    A hook on the layer itself is a reason: it was written for the dense layer and may not make sense for the Tucker
    form. Hooks on all other modules, its parents included, are no obstacle.

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
    if _has_further_state(layer):
        return "holds more than a weight and a bias, which its replacement would lose"
    weight = cast("Tensor", layer.weight)
    if not weight.is_floating_point():
        return f"weight of dtype {weight.dtype}, not a real floating-point one"
    return handler.refuse(layer)


def user_modification(module: nn.Module) -> str | None:
    """Return what a user changed on one module, hooks or its `forward`, that a replacement would lose; or None."""
    if hooks := [name.strip("_") for name in _HOOKS if getattr(module, name)]:
        return f"has {', '.join(hooks).replace('_', ' ')}; remove them to replace it"
    return "its forward method was replaced on the instance" if "forward" in vars(module) else None


def convolves_as_stored(layer: nn.Module) -> bool:
    """Whether a layer can be replaced and convolves with the weight that it stores."""
    return skip_reason(layer) is None and handler_of(layer).weight is _stored_weight


def _has_further_state(layer: nn.Module) -> bool:
    """Whether a layer has children or, where it is one of PyTorch's own, tensors besides weight and bias."""
    from_torch = type(layer) in _LAYERS  # the handlers of other classes read what else these have
    further = from_torch and (layer._buffers or layer._parameters.keys() - {"weight", "bias"})  # noqa: SLF001
    return bool(further) or any(layer.children())


def handler_of(layer: nn.Module) -> Handler:
    """Return the handler of a layer's exact class.

    Raises:
        UnsupportedError: When the layer has a `skip_reason`.
    """
    if reason := skip_reason(layer):
        raise UnsupportedError(f"{layer} cannot be replaced exactly: {reason}.")
    return _HANDLERS[type(layer)]


def own_cost(layer: nn.Module) -> tuple[int, int]:
    """Return the flops of one call besides the convolution, and the number of parameters besides weight and bias."""
    elements = cast("Tensor", layer.weight).numel()
    bias = cast("Tensor | None", layer.bias)
    params = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    return handler_of(layer).weight_flops * elements, params - elements - (0 if bias is None else bias.numel())


def canonical_weight(layer: nn.Module) -> Tensor:
    """Return the effective weight of a layer in canonical form, the same for all kinds of layers.

    Args:
        layer: A convolution or linear layer that has no `skip_reason`.

    Returns:
        (groups, C_out / groups, C_in / groups, k...), detached; it may share memory with the layer.

    Raises:
        UnsupportedError: When the layer has a `skip_reason`.
    """
    return to_canonical(handler_of(layer).weight(layer).detach(), layer)


def canonical_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias of a convolution or linear layer, (C_out,) and detached, or None."""
    bias = cast("Tensor | None", layer.bias)
    return None if bias is None else bias.detach()


def to_canonical(weight: Tensor, layer: nn.Module) -> Tensor:
    """View a weight in the layout of `layer` as (groups, C_out / groups, C_in / groups, k...)."""
    weight = weight.view(getattr(layer, "groups", 1), -1, *weight.shape[1:])
    return weight.transpose(1, 2) if getattr(layer, "transposed", False) else weight


def from_canonical(weight: Tensor, layer: nn.Module) -> Tensor:
    """Bring a canonical weight back into the layout of `layer`; the inverse of `to_canonical`."""
    return (weight.transpose(1, 2) if getattr(layer, "transposed", False) else weight).flatten(0, 1)
