"""Record one run of a model: the calls and sizes of each layer, and the weights that are used without their layer."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from math import inf
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from batude_fx.errors import DiscoveryError, first_line
from batude_fx.graph.sites import ConvSite
from batude_fx.support.hooks import observe_calls
from batude_fx.support.inputs import Inputs

_TRANSPOSED_FUNCTIONS = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d} | _TRANSPOSED_FUNCTIONS
_SELECTIONS = {  # functions whose result has a size that depends on values
    *(torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.masked_select, Tensor.masked_select),
    *(torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive),
}


@dataclass(frozen=True)
class LayerEntry:
    """A convolution or linear layer in the module tree of a model.

    Attributes:
        layer: The layer.
        names: All of its qualified names; the first one is the name of its site.
        parameter_sharers: Names of other modules that hold one of its parameters.
        parent_reason: Why its parent module forbids to replace it, or None.
    """

    layer: nn.Module
    names: tuple[str, ...]
    parameter_sharers: tuple[str, ...]
    parent_reason: str | None

    @property
    def weight(self) -> nn.Parameter | None:
        """The stored weight; None where the weight is a property, which makes a new tensor at each access."""
        return self.layer._parameters.get("weight")  # noqa: SLF001


@dataclass
class CallCounts:
    """The calls of one layer or functional convolution during the run.

    Attributes:
        positions_in: Input positions (batch times space), summed over the calls.
        positions_out: Output positions, summed over the calls.
        calls: Number of calls.
        first_call: Place of its first call among all recorded calls, from 0; infinite if it is never called.
    """

    positions_in: int = 0
    positions_out: int = 0
    calls: int = 0
    first_call: float = inf


@dataclass
class CallRecorder:
    """Receives the calls of all layers and torch functions during a run, and keeps what discovery needs of them.

    Attributes:
        entries: The layers whose calls are recorded.
        tensor_names: `id` of every parameter and buffer to its qualified name.
        counts: The calls of each site, by its name.
        used_directly: Names of layers whose weight is used by a function outside of the layer.
        depth: Number of layers that are computing at this moment, one inside the other.
        sizes_vary: Whether the run makes a tensor whose size depends on values, as where a detector selects boxes.
    """

    entries: list[LayerEntry]
    tensor_names: dict[int, str]
    counts: dict[str, CallCounts] = field(default_factory=dict)
    used_directly: set[str] = field(default_factory=set)
    depth: int = 0
    sizes_vary: bool = False
    _functional: dict[str, ConvSite] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = {entry.names[0]: CallCounts() for entry in self.entries}
        self._weights = {id(entry.weight): entry.names[0] for entry in self.entries if entry.weight is not None}
        self._spatial_axes = {entry.names[0]: _spatial_axes(entry.layer) for entry in self.entries}
        self._calls_so_far = 0

    def before_layer(self, *_: object) -> None:
        """Note that a layer begins to compute: until it ends, torch functions are part of it and are not recorded."""
        self.depth += 1

    def after_layer(self, name: str, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        """Count a call of a layer by its first input and first output tensor; subclasses may have several of each."""
        self.depth -= 1
        self._count(name, _tensors((args, kwargs))[0], _tensors(output)[0], self._spatial_axes[name])

    def after_function(
        self, function: object, args: tuple[object, ...], kwargs: dict[str, object], result: object
    ) -> None:
        """Record a call of a torch function, unless it was made inside of one of the layers."""
        if self.depth:
            return
        if _tensors(result):  # a function that returns no tensor asks for a shape, dtype or device only
            names = (self._weights.get(id(arg)) for arg in _tensors((args, kwargs)))
            self.used_directly.update(name for name in names if name is not None)
        self.sizes_vary |= _selects(function, args)
        if function in _FUNCTIONS:
            self._record_convolution(cast("Callable[..., Tensor]", function), args, kwargs, cast("Tensor", result))

    def functional_sites(self) -> list[ConvSite]:
        """Return the convolutions that were called as functions, each with its calls."""
        return [with_calls(site, self.counts[name]) for name, site in self._functional.items()]

    def _record_convolution(
        self, function: Callable[..., Tensor], args: tuple[object, ...], kwargs: dict[str, object], result: Tensor
    ) -> None:
        # In conv*d and conv_transpose*d alike, groups are the seventh argument.
        x, weight = (cast("Tensor", _argument(args, kwargs, *key)) for key in ((0, "input"), (1, "weight")))
        has_bias = _argument(args, kwargs, 2, "bias") is not None
        groups = cast("int", _argument(args, kwargs, 6, "groups", 1))
        shape = ", ".join(map(str, weight.shape))
        name = self.tensor_names.get(id(weight), f"{function.__name__}({shape})")
        self._functional[name] = _functional_site(name, function, weight, groups, has_bias=has_bias)
        self._count(name, x, result, weight.ndim - 2)

    def _count(self, name: str, x: Tensor, output: Tensor, spatial_axes: int | None) -> None:
        # A linear layer has its channels last; in a convolution they precede the spatial axes, with or without a batch.
        axis = -1 if spatial_axes is None else int(x.ndim == spatial_axes + 2)
        counts = self.counts.setdefault(name, CallCounts())
        counts.positions_in += x.numel() // x.shape[axis]
        counts.positions_out += output.numel() // output.shape[axis]
        counts.calls += 1
        counts.first_call = min(counts.first_call, self._calls_so_far)
        self._calls_so_far += 1


class TorchCallHook(TorchFunctionMode):
    """A context in which a function is called after every torch function.

    Args:
        after: Called as `after(function, args, kwargs, result)`.
    """

    def __init__(self, after: Callable[[Any, tuple[object, ...], dict[str, object], object], None]) -> None:
        super().__init__()
        self._after = after

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - torch calls it with whatever function it overrides
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self._after(func, args, kwargs or {}, result)
        return result


def _functional_site(
    name: str, function: Callable[..., Tensor], weight: Tensor, groups: int, *, has_bias: bool
) -> ConvSite:
    """Return the site of a convolution that is called as a function, before its calls are counted."""
    transposed = function in _TRANSPOSED_FUNCTIONS
    first, second, *kernel = weight.shape
    return ConvSite(
        name=name,
        kind=function.__name__,
        in_channels=first if transposed else second * groups,
        out_channels=second * groups if transposed else first,
        kernel_size=tuple(kernel),
        groups=groups,
        transposed=transposed,
        positions_in=0,
        positions_out=0,
        calls=0,
        found_by="tree",
        skip_reason="functional convolution: its weight is no layer's that could be replaced",
        has_bias=has_bias,
    )


def _argument(
    args: tuple[object, ...], kwargs: dict[str, object], position: int, name: str, default: object = None
) -> object:
    """Return an argument of a call, whether it was passed by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def _selects(function: object, args: tuple[object, ...]) -> bool:
    """Whether the size of the result of a function depends on values."""
    if function is torch.where:
        return len(args) == 1
    if function is Tensor.__getitem__:
        return any(index.dtype == torch.bool for index in _tensors(args[1:]))
    return function in _SELECTIONS


def _spatial_axes(layer: nn.Module) -> int | None:
    """Return the number of spatial axes of a convolution; None for a linear layer, whose channels come last."""
    return len(cast("nn.Conv2d", layer).kernel_size) if isinstance(layer, _ConvNd) else None


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def with_calls(site: ConvSite, counts: CallCounts) -> ConvSite:
    """Return the site with the positions and calls that were counted."""
    return replace(site, positions_in=counts.positions_in, positions_out=counts.positions_out, calls=counts.calls)


def record_calls(model: nn.Module, entries: list[LayerEntry], inputs: Inputs) -> CallRecorder:
    """Run a model once and record its calls.

    Args:
        model: Any module, in eval mode; hooks are removed after the run.
        entries: The layers whose calls are recorded.
        inputs: Arguments of the run.

    Raises:
        DiscoveryError: The model does not run on these arguments.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    recorder = CallRecorder(entries, names)
    modules = {entry.names[0]: entry.layer for entry in entries}
    try:
        with (
            torch.no_grad(), TorchCallHook(recorder.after_function),
            observe_calls(modules, before=recorder.before_layer, after=recorder.after_layer),
        ):  # fmt: skip
            inputs.run(model)
    except Exception as error:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in inputs.tensors())
        raise DiscoveryError(
            f"{type(model).__name__} does not run on the example input of shape {shapes}: "
            f"{type(error).__name__}: {first_line(error)}. Pass example_inputs= with what its forward takes: "
            f"{', '.join(signature(model.forward).parameters)}."
        ) from error
    return recorder
