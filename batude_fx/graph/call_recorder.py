"""Listen to one run of a model: what it does to each layer, and which weights are used without their layer."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from batude_fx.errors import DiscoveryError, first_line
from batude_fx.graph.sites import ConvSite, FoundBy
from batude_fx.support.hooks import observe_calls

_TRANSPOSED_FUNCTIONS = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d} | _TRANSPOSED_FUNCTIONS
_SELECTIONS = {
    *(torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.masked_select, Tensor.masked_select),
    *(torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive),
}


@dataclass(frozen=True)
class FoundLayer:
    """A layer found in a model.

    Attributes:
        layer: The layer.
        names: The names it has.
        found_by: How it was found.
        sharers: Names of other modules that hold one of its parameters.
        place: Why a layer at this place cannot be replaced, or None.
    """

    layer: nn.Module
    names: tuple[str, ...]
    found_by: FoundBy
    sharers: tuple[str, ...]
    place: str | None

    @property
    def weight(self) -> nn.Parameter | None:
        """The stored weight; None where it is computed, which makes a new tensor at each access."""
        return self.layer._parameters.get("weight")  # noqa: SLF001


@dataclass
class Calls:
    """What one run of the example does to a layer or a functional convolution."""

    positions_in: int = 0
    positions_out: int = 0
    calls: int = 0
    first_call: float = inf


@dataclass
class CallRecorder:
    """Hears every call of the found layers and, outside them, every use of a weight and every convolution.

    Attributes:
        found: The layers to listen to.
        tensor_names: Identity of every parameter and buffer to its qualified name.
        calls: Name of a site to what the run does to it.
        used_directly: Names of the found layers whose weight something else computes with.
        depth: How many of the layers are computing at this moment, one inside the other.
        selects: Whether the run makes a tensor whose size depends on values, as a detector chooses its boxes.
    """

    found: list[FoundLayer]
    tensor_names: dict[int, str]
    calls: dict[str, Calls] = field(default_factory=dict)
    used_directly: set[str] = field(default_factory=set)
    depth: int = 0
    selects: bool = False
    _functional: dict[str, ConvSite] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls = {one.names[0]: Calls() for one in self.found}
        self._weights = {id(one.weight): one.names[0] for one in self.found if one.weight is not None}
        self._spatial = {one.names[0]: _spatial_axes(one.layer) for one in self.found}
        self._total = 0

    def enter(self, *_: object) -> None:
        """A layer begins to compute."""
        self.depth += 1

    def leave(self, name: str, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        """A layer has computed: count the call. Subclasses may take and return more than one tensor."""
        self.depth -= 1
        self._count(name, _tensors((args, kwargs))[0], _tensors(output)[0], self._spatial[name])

    def heard(self, function: object, args: tuple[object, ...], kwargs: dict[str, object], result: object) -> None:
        """A torch function was called; those outside of all found layers count."""
        if self.depth:
            return
        if _tensors(result):  # shapes, dtypes and devices may be asked for
            used = (self._weights.get(id(arg)) for arg in _tensors((args, kwargs)))
            self.used_directly.update(name for name in used if name is not None)
        self.selects |= _selects(function, args)
        if function in _FUNCTIONS:
            self._hear_convolution(cast("Callable[..., Tensor]", function), args, kwargs, cast("Tensor", result))

    def functional_sites(self) -> list[ConvSite]:
        """The convolutions that were called as functions, each with its calls."""
        return [with_calls(site, self.calls[name]) for name, site in self._functional.items()]

    def _hear_convolution(
        self, function: Callable[..., Tensor], args: tuple[object, ...], kwargs: dict[str, object], result: Tensor
    ) -> None:
        x, weight = (cast("Tensor", v) for v in (*args, *(kwargs[k] for k in ("input", "weight") if k in kwargs))[:2])
        groups = cast("int", args[6] if len(args) > 6 else kwargs.get("groups", 1))  # noqa: PLR2004
        transposed = function in _TRANSPOSED_FUNCTIONS
        shape = ", ".join(map(str, weight.shape))
        name = self.tensor_names.get(id(weight), f"{function.__name__}({shape})")
        outer, inner, *kernel = weight.shape
        self._functional[name] = ConvSite(
            name=name,
            kind=function.__name__,
            in_channels=outer if transposed else inner * groups,
            out_channels=inner * groups if transposed else outer,
            kernel_size=tuple(kernel),
            groups=groups,
            transposed=transposed,
            positions_in=0,
            positions_out=0,
            calls=0,
            found_by="tree",
            skip_reason="functional convolution: its weight is no layer's that could be replaced",
            has_bias=(args[2] if len(args) > 2 else kwargs.get("bias")) is not None,  # noqa: PLR2004
        )
        self._count(name, x, result, len(kernel))

    def _count(self, name: str, x: Tensor, output: Tensor, spatial: int | None) -> None:
        # Channels are last in a linear layer, first where there is no batch axis.
        axis = -1 if spatial is None else int(x.ndim == spatial + 2)
        calls = self.calls.setdefault(name, Calls())
        calls.positions_in += x.numel() // x.shape[axis]
        calls.positions_out += output.numel() // output.shape[axis]
        calls.calls += 1
        calls.first_call = min(calls.first_call, self._total)
        self._total += 1


class TorchCallHook(TorchFunctionMode):
    """Tells of every torch function that is called.

    Args:
        hear: Gets the function, its arguments, its keyword arguments and its result.
    """

    def __init__(self, hear: Callable[[Any, tuple[object, ...], dict[str, object], object], None]) -> None:
        super().__init__()
        self._hear = hear

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - torch calls it with whatever function it overrides
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self._hear(func, args, kwargs or {}, result)
        return result


def _selects(function: object, args: tuple[object, ...]) -> bool:
    """Whether the size of what a function returns depends on values."""
    if function is torch.where:
        return len(args) == 1
    if function is Tensor.__getitem__:
        return any(index.dtype == torch.bool for index in _tensors(args[1:]))
    return function in _SELECTIONS


def _spatial_axes(layer: nn.Module) -> int | None:
    """How many spatial axes a convolution has; None for a linear layer, whose channels come last."""
    return len(cast("nn.Conv2d", layer).kernel_size) if isinstance(layer, _ConvNd) else None


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def with_calls(site: ConvSite, calls: Calls) -> ConvSite:
    """The site with what a run does to it."""
    return replace(site, positions_in=calls.positions_in, positions_out=calls.positions_out, calls=calls.calls)


def record_calls(model: nn.Module, found: list[FoundLayer], inputs: tuple[object, ...]) -> CallRecorder:
    """Run the example once and listen.

    Args:
        model: A borrowed model; the hooks go when it is given back.
        found: The layers to listen to.
        inputs: Arguments of the run.

    Raises:
        DiscoveryError: The model does not run on these arguments.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    recorder = CallRecorder(found, names)
    layers = {one.names[0]: one.layer for one in found}
    try:
        with (
            torch.no_grad(), TorchCallHook(recorder.heard),
            observe_calls(layers, before=recorder.enter, after=recorder.leave),
        ):  # fmt: skip
            model(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in _tensors(inputs))
        raise DiscoveryError(
            f"{type(model).__name__} does not run on the example input of shape {shapes}: "
            f"{type(error).__name__}: {first_line(error)}. Pass example_inputs= with what its forward takes."
        ) from error
    return recorder
