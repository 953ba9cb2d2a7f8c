"""Fold batch-norms into the layers before them, for deployment.

In eval mode a batch-norm multiplies each channel by s = gain / sqrt(running variance + eps) and adds t = offset -
running mean * s. After a layer W x + b this gives s (W x + b) + t = (s W) x + (s b + t): the same layer with other
numbers, and the batch-norm costs nothing any more.

One run on the example input shows which layer's output goes to a batch-norm and nowhere else. So networks that cannot
be traced are folded as well, and a layer that is called twice, or whose output is also used elsewhere, stays as it is.

Source: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, https://arxiv.org/abs/1712.05877, section 3.2.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field
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
from batude_fx.support.inputs import ExampleInputs, Inputs
from batude_fx.support.model_state import private_copy
from batude_fx.tucker.dense_layers import convolves_as_stored, from_canonical, to_canonical, user_modification
from batude_fx.tucker.modules import TuckerModule

ModelT = TypeVar("ModelT", bound=nn.Module)
_WITH_ACTIVATION = (BatchNormAct2d, FrozenBatchNormAct2d)
# Names of functions that read a shape or a dtype, not values, if they return no tensor; `__get__` reads any attribute.
_METADATA = {"__get__", "size", "dim", "ndimension", "numel", "stride", "is_floating_point", "is_contiguous"}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d, *_WITH_ACTIVATION)


def fold(model: ModelT, example_inputs: ExampleInputs | None = None) -> ModelT:
    """Return a copy of a network, compressed or not, whose batch-norms are folded into the layers before them.

    Args:
        model: Any module; it is left as it is.
        example_inputs: Arguments of one forward pass. By default, those that timm or torchvision declare for the model.

    Returns:
        A network of the same class in eval mode, with the same outputs up to rounding. It is for inference only: in
        training, a batch-norm would use the statistics of the batch. The layers have a bias that they did not have, so
        `save` cannot rebuild the network by name; `export` can write it.

    Raises:
        DiscoveryError: No `example_inputs` are given, and none are declared for the model.

    Source: B. Jacob et al., CVPR 2018, section 3.2; torch's `fuse_conv_bn_eval` folds one given pair.
    """
    with private_copy(model) as copied:
        names = {module: name for name, module in copied.named_modules()}
        foldable_pairs = _OutputTracker(copied).run(resolve_inputs(model, example_inputs))
    modules: dict[str, nn.Module] = {}
    for layer_name, norm_name in ((names[layer], names[norm]) for layer, norm in foldable_pairs):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        modules[layer_name] = _folded(layer, norm)
        modules[norm_name] = _rest_of_norm(norm)
    folded = replace_modules(model, modules)
    folded.eval()
    return folded


@dataclass
class _OutputTracker:
    """Follows the outputs of layers through one run of a model: which batch-norm gets each, and what else uses it.

    A batch-norm can be folded into a layer if the layer is called once, its output goes to the batch-norm and nowhere
    else, and the batch-norm gets nothing else. Tensors are keys by identity, as in the state of torch's optimizers. The
    keys keep all of these tensors alive during the run, so that no identity is given to a second tensor.

    Attributes:
        model: The model, in eval mode.
        layer_of: Output to the layer that returned it.
        norm_of: Output to the batch-norm that was called with it.
        uses: Number of torch functions that computed with each output and each parameter.
        calls: Number of calls of each layer and batch-norm.
        returned: The tensors that the model returned.
    """

    model: nn.Module
    layer_of: dict[Tensor, nn.Module] = field(default_factory=dict, init=False)
    norm_of: dict[Tensor, nn.Module] = field(default_factory=dict, init=False)
    uses: Counter[Tensor] = field(default_factory=Counter, init=False)
    calls: Counter[nn.Module] = field(default_factory=Counter, init=False)
    returned: set[Tensor] = field(default_factory=set, init=False)

    def run(self, inputs: Inputs) -> list[tuple[nn.Module, nn.Module]]:
        """Run the model once; return every layer that a batch-norm can be folded into, with the latter."""
        self.uses.update(dict.fromkeys(self.model.parameters(), 0))
        layers = {module: module for module in self.model.modules() if _is_layer(module)}
        norms = {module: module for module in self.model.modules() if _is_norm(module)}
        with (
            torch.no_grad(), TorchCallHook(self._count_uses),
            observe_calls(layers, after=self._after_layer), observe_calls(norms, before=self._before_norm),
        ):  # fmt: skip
            self.returned = _tensors(inputs.run(self.model))
        pairs = [(self.layer_of[output], norm) for output, norm in self.norm_of.items() if self._has_one_use(output)]
        return [
            (layer, norm)
            for layer, norm in pairs
            if self.calls[layer] == self.calls[norm] == 1 and not self._is_shared(layer) and not self._is_shared(norm)
        ]

    def _after_layer(self, layer: nn.Module, _args: object, _kwargs: object, output: object) -> None:
        self.calls[layer] += 1
        if isinstance(output, Tensor) and output.ndim == _batched_ndim(layer):
            # The output of a Tucker module is that of its last part: the module comes later and takes its place.
            self.layer_of[output] = layer
            self.uses[output] = 0

    def _before_norm(self, norm: nn.Module, args: tuple[object, ...], _kwargs: object) -> None:
        self.calls[norm] += 1
        if args and isinstance(args[0], Tensor) and args[0] in self.layer_of:
            self.norm_of[args[0]] = norm

    def _count_uses(
        self,
        function: Any,  # noqa: ANN401 - whatever torch function is called
        args: tuple[object, ...],
        kwargs: dict[str, object],
        result: object,
    ) -> None:
        reads_metadata = function.__name__ in _METADATA and not _tensors(result)
        if not reads_metadata:
            self.uses.update(tensor for tensor in _tensors((args, kwargs)) if tensor in self.uses)

    def _has_one_use(self, output: Tensor) -> bool:
        return self.uses[output] <= 1 and output not in self.returned

    def _is_shared(self, module: nn.Module) -> bool:
        """Return whether anything besides the module used its parameters."""
        return any(self.uses[parameter] > 1 for parameter in module.parameters(recurse=False))


def _tensors(tree: object) -> set[Tensor]:
    return {leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _is_layer(module: nn.Module) -> bool:
    """Return whether a batch-norm could be folded into a module: it convolves as torch's own layers do."""
    if isinstance(module, TuckerModule):
        return not any(user_modification(part) for part in module.modules())
    return convolves_as_stored(module)


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch-norm with running statistics that nobody modified."""
    has_statistics = type(module) in _NORMS and getattr(module, "running_mean", None) is not None
    return has_statistics and user_modification(module) is None


def _batched_ndim(layer: nn.Module) -> int:
    """Return the axes of a batch of outputs (N, C, ...).

    A batch-norm takes axis 1 for the channels. In an output with other axes, (C, ...) without a batch or (N, L, C) of a
    linear layer, axis 1 is not the layer's channels.
    """
    return 2 + len(getattr(layer, "kernel_size", ()))


@torch.no_grad()
def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return a copy of a layer, its weight multiplied by the scale of a batch-norm and its bias scaled and shifted."""
    folded = copy.deepcopy(layer)
    last = cast("nn.Conv2d", folded.last if isinstance(folded, TuckerModule) else folded)
    fine = torch.promote_types(last.weight.dtype, torch.float32)  # half precision is rounded once, at the end
    mean, variance, gain, offset = (
        None if (value := getattr(norm, name)) is None else value.to(fine)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = (cast("Tensor", variance) + cast("float", norm.eps)).rsqrt() * (1 if gain is None else gain)  # (C_out,)
    shift = (0 if offset is None else offset) - cast("Tensor", mean) * scale
    weight = to_canonical(last.weight.to(fine), last)  # (groups, C_out / groups, ...)
    row_scales = scale.view(*weight.shape[:2], *[1] * (weight.ndim - 2))
    bias = shift if last.bias is None else last.bias.to(fine) * scale + shift
    last.bias = nn.Parameter(bias.to(last.weight.dtype))
    last.weight.copy_(from_canonical(weight * row_scales, last))
    return folded


def _rest_of_norm(norm: nn.Module) -> nn.Module:
    """Return what a batch-norm does besides normalizing: timm's contain a drop layer and an activation."""
    if not isinstance(norm, _WITH_ACTIVATION):
        return nn.Identity()
    return nn.Sequential(copy.deepcopy(norm.drop), copy.deepcopy(norm.act))
