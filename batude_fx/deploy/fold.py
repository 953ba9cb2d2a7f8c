"""Batch-norm folded into the layer before it, for deployment: a scale and a shift per channel cost nothing there.

One run of the example shows which layer's output goes to a batch-norm and nowhere else. Networks that cannot be traced
are folded as well, and a layer that is called twice, or whose output is also used elsewhere, is left alone.

Source: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, https://arxiv.org/abs/1712.05877, section 3.2.
"""

import copy
from collections import Counter
from typing import Any, TypeVar, cast

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d

from batude_fx.graph.call_recorder import TorchCallHook
from batude_fx.graph.example_inputs import resolve_inputs
from batude_fx.graph.surgery import replace_modules
from batude_fx.support.hooks import observe_calls
from batude_fx.support.model_state import eval_and_restore
from batude_fx.tucker.dense_layers import convolves_as_stored, from_canonical, to_canonical, user_modification
from batude_fx.tucker.modules import TuckerModule

ModelT = TypeVar("ModelT", bound=nn.Module)
_WITH_ACTIVATION = (BatchNormAct2d, FrozenBatchNormAct2d)
_QUESTIONS = {"__get__", "size", "dim", "ndimension", "numel", "stride", "is_floating_point", "is_contiguous"}
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

    Source: B. Jacob et al., CVPR 2018, section 3.2; torch's `fuse_conv_bn_eval` does it for a pair that is known.
    """
    modules: dict[str, nn.Module] = {}
    for name, norm_name in _pairs(model, resolve_inputs(model, example_inputs)).items():
        norm = model.get_submodule(norm_name)
        modules[name] = _folded(model.get_submodule(name), norm)
        modules[norm_name] = _remainder(norm)
    folded = replace_modules(model, modules)
    folded.eval()
    return folded


def _pairs(model: nn.Module, inputs: tuple[object, ...]) -> dict[str, str]:
    """Name of every layer that a batch-norm can be folded into, to the name of the batch-norm."""
    names = {module: name for name, module in model.named_modules()}
    layers = {module for module in names if _is_layer(module)}
    norms = {module for module in names if _is_norm(module)}
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept, so that none gets another's identity
    followed: dict[nn.Module, nn.Module] = {}
    calls: Counter[nn.Module] = Counter()
    uses: Counter[int] = Counter()  # of each tensor, by torch functions that do more than ask for its shape

    def hear(function: Any, args: tuple[object, ...], kwargs: dict[str, object], result: object) -> None:  # noqa: ANN401
        if function.__name__ not in _QUESTIONS or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            uses.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})

    def after_layer(layer: nn.Module, _args: object, _kwargs: object, output: object) -> None:
        calls[layer] += 1
        if isinstance(output, Tensor) and output.ndim == _batched(layer):
            outputs[id(output)] = layer, output
            uses[id(output)] = 0  # an earlier tensor may have had this identity

    def before_norm(norm: nn.Module, args: tuple[object, ...], _kwargs: object) -> None:
        calls[norm] += 1
        if args and id(args[0]) in outputs:
            followed[outputs[id(args[0])][0]] = norm

    with (
        eval_and_restore(model), torch.no_grad(), TorchCallHook(hear),
        observe_calls({layer: layer for layer in layers}, after=after_layer),
        observe_calls({norm: norm for norm in norms}, before=before_norm),
    ):  # fmt: skip
        returned = {id(leaf) for leaf in tree_leaves(model(*inputs))}
    elsewhere = {layer for key, (layer, _) in outputs.items() if uses[key] > 1 or key in returned}
    shared = {module for module in names if any(uses[id(one)] > 1 for one in module.parameters(recurse=False))}
    return {
        names[layer]: names[norm]
        for layer, norm in followed.items()
        if calls[layer] == calls[norm] == 1 and layer not in elsewhere | shared and norm not in shared
    }


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, TuckerModule):
        return not any(user_modification(part) for part in module.modules())
    return convolves_as_stored(module)


def _is_norm(module: nn.Module) -> bool:
    known = type(module) in _NORMS and getattr(module, "running_mean", None) is not None
    return known and user_modification(module) is None


def _batched(layer: nn.Module) -> int:
    """Axes of an output whose channels a batch-norm takes for its own; of a linear layer's (N, L, C) it takes L."""
    return 2 + len(getattr(layer, "kernel_size", ()))


@torch.no_grad()
def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    folded = copy.deepcopy(layer)
    last = cast("nn.Conv2d", folded.last if isinstance(folded, TuckerModule) else folded)
    fine = torch.promote_types(last.weight.dtype, torch.float32)  # half precision is rounded once, at the end
    mean, variance, gain, offset = (
        None if (one := getattr(norm, name)) is None else one.to(fine)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = (cast("Tensor", variance) + cast("float", norm.eps)).rsqrt() * (1 if gain is None else gain)  # (C_out,)
    shift = (0 if offset is None else offset) - cast("Tensor", mean) * scale
    weight = to_canonical(last.weight.to(fine), last)  # (groups, C_out / groups, ...)
    gains = scale.view(*weight.shape[:2], *[1] * (weight.ndim - 2))
    bias = shift if last.bias is None else last.bias.to(fine) * scale + shift
    last.bias = nn.Parameter(bias.to(last.weight.dtype))
    last.weight.copy_(from_canonical(weight * gains, last))
    return folded


def _remainder(norm: nn.Module) -> nn.Module:
    """What is left of a batch-norm: timm's have a drop layer and an activation inside."""
    if not isinstance(norm, _WITH_ACTIVATION):
        return nn.Identity()
    return nn.Sequential(copy.deepcopy(norm.drop), copy.deepcopy(norm.act))
