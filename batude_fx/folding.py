"""Batch-norm folded into the layer before it, for deployment: a scale and a shift per channel cost nothing there.

One run of the example shows which layer's output goes to a batch-norm and nowhere else. Networks that cannot be traced
are folded as well, and a layer that is called twice, or whose output is also used elsewhere, is left alone.

Source: `torch.nn.utils.fusion`; B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, https://arxiv.org/abs/1712.05877, section 3.2.
"""

import copy
from collections import Counter
from typing import Any, TypeVar, cast

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d

from batude_fx.borrowing import borrowed
from batude_fx.handlers import convolves_as_stored
from batude_fx.modules import TuckerLinear, TuckerModule
from batude_fx.surgery import replace
from batude_fx.zoo import arguments

ModelT = TypeVar("ModelT", bound=nn.Module)

_WITH_ACTIVATION = (BatchNormAct2d, FrozenBatchNormAct2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d, *_WITH_ACTIVATION)


def fold(model: ModelT, example_inputs: Tensor | tuple[object, ...] | None = None) -> ModelT:
    """A copy of a network, compressed or not, whose batch-norms are folded into the layers before them.

    Args:
        model: Any module; it is left as it is.
        example_inputs: Arguments of one run. By default what timm or torchvision knows of the model.

    Returns:
        A network of the same class in eval mode, with the same outputs up to rounding. It is for inference: in training
        a batch-norm would follow its batch. Layers get a bias, so `save` cannot rebuild it by name; `export` writes it.

    Raises:
        DiscoveryError: Nothing is known of the model's input, and none was given.

    Source: `torch.nn.utils.fusion.fuse_conv_bn_weights`.
    """
    modules: dict[str, nn.Module] = {}
    for name, norm_name in _pairs(model, arguments(model, example_inputs)).items():
        norm = model.get_submodule(norm_name)
        modules[name] = _folded(model.get_submodule(name), norm)
        modules[norm_name] = _remainder(norm)
    return replace(model, modules).eval()


def _pairs(model: nn.Module, inputs: tuple[object, ...]) -> dict[str, str]:
    """Name of every layer that a batch-norm can be folded into, to the name of the batch-norm."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept, so that none gets another's identity
    followed: dict[nn.Module, nn.Module] = {}
    calls: Counter[nn.Module] = Counter()
    uses = _Uses()

    def after_layer(layer: nn.Module, _args: object, output: object) -> None:
        calls[layer] += 1
        # Of a linear layer's (N, L, C) a batch-norm takes L for the channels.
        if isinstance(output, Tensor) and not (isinstance(layer, nn.Linear | TuckerLinear) and output.ndim > 2):  # noqa: PLR2004
            outputs[id(output)] = layer, output
            uses.count[id(output)] = 0  # an earlier tensor may have had this identity

    def before_norm(norm: nn.Module, args: tuple[object, ...]) -> None:
        calls[norm] += 1
        if args and id(args[0]) in outputs:
            followed[outputs[id(args[0])][0]] = norm

    with borrowed(model), torch.no_grad(), uses:
        for module in names:
            if isinstance(module, TuckerModule) or convolves_as_stored(module):
                module.register_forward_hook(after_layer)
            elif type(module) in _NORMS and getattr(module, "running_mean", None) is not None:
                module.register_forward_pre_hook(before_norm)
        returned = {id(leaf) for leaf in tree_leaves(model(*inputs))}
    elsewhere = {layer for key, (layer, _) in outputs.items() if uses.count[key] > 1 or key in returned}
    return {
        names[layer]: names[norm]
        for layer, norm in followed.items()
        if calls[layer] == calls[norm] == 1 and layer not in elsewhere
    }


class _Uses(TorchFunctionMode):
    """Counts how many torch functions compute with each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - torch calls it with whatever function it overrides
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # shapes may be asked for
            self.count.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
        return result


def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    folded = copy.deepcopy(layer)
    last = cast("nn.Conv2d", folded.last if isinstance(folded, TuckerModule) else folded)
    known = cast("nn.BatchNorm2d", norm)
    mean, variance = cast("Tensor", known.running_mean), cast("Tensor", known.running_var)
    last.weight, last.bias = fuse_conv_bn_weights(
        last.weight, last.bias, mean, variance, known.eps, known.weight, known.bias,
        transpose=getattr(last, "transposed", False),
    )  # fmt: skip
    return folded


def _remainder(norm: nn.Module) -> nn.Module:
    """What is left of a batch-norm: timm's have a drop layer and an activation inside."""
    if not isinstance(norm, _WITH_ACTIVATION):
        return nn.Identity()
    return nn.Sequential(copy.deepcopy(norm.drop), copy.deepcopy(norm.act))
