"""Find every convolution of a model, with what its cost depends on and, where it must stay dense, the reason.

The traced graph finds convolutions; the module tree is the safety net for what the graph cannot see. One run of the
example input then gives every site its sizes and its calls, and shows which weights are used without their layer.
The only module that imports torch.fx.

Source: torchvision's `feature_extraction` (a tracer with chosen leaves), timm's lists of modules and functions that
must not be traced.
"""

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import inf, prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules  # type: ignore[attr-defined]
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from batude_fx import handlers
from batude_fx.borrowing import borrowed
from batude_fx.errors import DiscoveryError, SelectionError
from batude_fx.sites import ConvSite, FoundBy
from batude_fx.zoo import example_inputs as default_inputs

_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {"conv": (_ConvNd,), "conv+linear": (_ConvNd, nn.Linear)}
_TRANSPOSED_FUNCTIONS = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d} | _TRANSPOSED_FUNCTIONS


def discover(
    model: nn.Module,
    example_inputs: tuple[object, ...] | None = None,
    *,
    layers: str = "conv",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> tuple[ConvSite, ...]:
    """List every convolution of a model, each replaceable or with the reason why not.

    Args:
        model: Any module; it is bit-identical afterwards, also when an error is raised.
        example_inputs: Arguments of one run. By default what timm or torchvision knows of the model.
        layers: "conv", or "conv+linear" to list linear layers too.
        include: Globs over qualified names; sites that match none are listed as not included.
        exclude: Globs; sites that match one are listed as excluded.

    Returns:
        The sites in the order of their first call; those that are never called come last. A convolution that is
        called as a function is listed too, under the name of its weight or, where that has none, its shape.

    Raises:
        DiscoveryError: The model has no such layer, or does not run on the example input.
        SelectionError: A pattern matches no site, or `layers` is neither of its two values.
    """
    if layers not in _LAYERS:
        raise SelectionError(f"layers={layers!r} is not known; use one of {', '.join(map(repr, _LAYERS))}.")
    if isinstance(example_inputs, Tensor):
        raise DiscoveryError("example_inputs is a tensor; pass the tuple of what forward takes: (tensor,).")
    _refuse_lazy(model)
    with borrowed(model):
        found = _find(model, _LAYERS[layers])
        if not found and example_inputs is None:
            raise _nothing_found(model, layers)
        listener = _run(model, found, example_inputs or default_inputs(model))
    sites = [*(_site(layer, listener) for layer in found), *listener.functional_sites()]
    if not sites:
        raise _nothing_found(model, layers)
    sites.sort(key=lambda site: listener.calls[site.name].first_call)
    return _select(sites, _patterns(include), _patterns(exclude))


@dataclass(frozen=True)
class _Found:
    """A layer, the names it has, how it was found, and the names of other modules that hold its weight."""

    layer: nn.Module
    names: tuple[str, ...]
    found_by: FoundBy
    sharers: tuple[str, ...]

    @property
    def weight(self) -> nn.Parameter | None:
        """The stored weight; None where it is computed, which makes a new tensor at each access."""
        return self.layer._parameters.get("weight")  # noqa: SLF001


class _Tracer(fx.Tracer):
    """Stops at the wanted layers and at what timm says must not be traced."""

    def __init__(self, kinds: tuple[type[nn.Module], ...]) -> None:
        functions = get_notrace_functions()  # type: ignore[no-untyped-call]
        super().__init__(autowrap_functions=tuple(functions), param_shapes_constant=True)
        self._leaves = (*kinds, *get_notrace_modules())  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def _find(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[_Found]:
    """Every layer in the module tree; the graph says how it was reached."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    owners: dict[int, list[str]] = {}
    for module, (name, *_) in names.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    called = _called_modules(model, kinds)
    found = []
    for layer, own in names.items():
        if isinstance(layer, kinds):
            found_by = next((how for name in own if (how := _reached(name, called))), "tree")
            one = _Found(layer, tuple(own), cast("FoundBy", found_by), ())
            sharers = (name for name in owners.get(id(one.weight), ()) if name != own[0])
            found.append(replace(one, sharers=tuple(sharers)))
    return found


def _reached(name: str, called: Mapping[str, str]) -> str | None:
    """How the graph reaches a layer: as a node of its own, or inside a leaf."""
    if name in called:
        return called[name]
    parents = (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
    return "leaf" if any(parent in called for parent in parents) else None


def _called_modules(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, str]:
    """Trace the model or, where that fails, its children, as deep as needed.

    Returns:
        Qualified name of every module that is a node of a graph, to "fx" or "child".
    """
    called: dict[str, str] = {}
    queue: list[tuple[str, nn.Module]] = [("", model)]
    while queue:
        prefix, module = queue.pop()
        if not any(isinstance(part, kinds) for part in module.modules()):
            continue
        if isinstance(module, kinds):
            called[prefix.rstrip(".")] = "child" if prefix else "fx"
        elif (graph := _graph(module, kinds)) is None:
            queue += [(f"{prefix}{name}.", child) for name, child in module.named_children()]
        else:
            nodes = (node for node in graph.nodes if node.op == "call_module")
            called |= {f"{prefix}{node.target}": "child" if prefix else "fx" for node in nodes}
    return called


def _graph(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> fx.Graph | None:
    try:
        with warnings.catch_warnings():
            # What the model or fx has to say about proxies is of no use to those who only want the list.
            warnings.simplefilter("ignore")
            return _Tracer(kinds).trace(module)
    except Exception:  # noqa: BLE001 - tracing runs the model's own code, which may fail in any way
        return None


@dataclass
class _Calls:
    """What one run of the example does to a layer or a functional convolution."""

    positions_in: int = 0
    positions_out: int = 0
    calls: int = 0
    first_call: float = inf


@dataclass
class _Listener:
    """Hears every call of the found layers and, outside them, every use of a weight and every convolution.

    Attributes:
        calls: Name of a site to what the run does to it.
        used_directly: Names of the found layers whose weight something else computes with.
    """

    found: list[_Found]
    parameter_names: dict[int, str]
    calls: dict[str, _Calls] = field(default_factory=dict)
    used_directly: set[str] = field(default_factory=set)
    depth: int = 0
    _functional: dict[str, ConvSite] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls = {one.names[0]: _Calls() for one in self.found}
        self._weights = {id(one.weight): one.names[0] for one in self.found if one.weight is not None}
        self._total = 0

    def enter(self, *_: object) -> None:
        """A layer begins to compute (forward pre-hook)."""
        self.depth += 1

    def leaver(self, one: _Found) -> Callable[..., None]:
        """The forward hook of a layer."""
        conv = isinstance(one.layer, _ConvNd)
        spatial = len(cast("nn.Conv2d", one.layer).kernel_size) if conv else None

        def leave(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> None:
            self.depth -= 1
            self._count(one.names[0], tree_leaves((args, kwargs))[0], output, spatial)

        return leave

    def heard(self, function: object, args: tuple[object, ...], kwargs: dict[str, object], result: object) -> None:
        """A torch function was called, outside of all found layers."""
        if isinstance(result, Tensor):  # shapes, dtypes and devices may be asked for
            self.used_directly |= {
                self._weights[id(arg)] for arg in tree_leaves((args, kwargs)) if id(arg) in self._weights
            }
            if function in _FUNCTIONS:
                self._hear_convolution(cast("Callable[..., Tensor]", function), args, kwargs, result)

    def functional_sites(self) -> list[ConvSite]:
        """The convolutions that were called as functions, each with its calls."""
        return [_with_calls(site, self.calls[name]) for name, site in self._functional.items()]

    def _hear_convolution(
        self, function: Callable[..., Tensor], args: tuple[object, ...], kwargs: dict[str, object], result: Tensor
    ) -> None:
        x, weight = (cast("Tensor", v) for v in (*args, *(kwargs[k] for k in ("input", "weight") if k in kwargs))[:2])
        groups = cast("int", args[6] if len(args) > 6 else kwargs.get("groups", 1))  # noqa: PLR2004
        transposed = function in _TRANSPOSED_FUNCTIONS
        shape = ", ".join(map(str, weight.shape))
        name = self.parameter_names.get(id(weight), f"{function.__name__}({shape})")
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
        calls = self.calls.setdefault(name, _Calls())
        calls.positions_in += x.numel() // x.shape[axis]
        calls.positions_out += output.numel() // output.shape[axis]
        calls.calls += 1
        calls.first_call = min(calls.first_call, self._total)
        self._total += 1


class _Overhear(TorchFunctionMode):
    """Tells a listener of the torch functions that are called outside all found layers."""

    def __init__(self, listener: _Listener) -> None:
        super().__init__()
        self._listener = listener

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - torch calls it with whatever function it overrides
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if self._listener.depth == 0:
            self._listener.heard(func, args, kwargs or {}, result)
        return result


def _run(model: nn.Module, found: list[_Found], inputs: tuple[object, ...]) -> _Listener:
    """Run the example once and listen; the hooks go when the model is given back."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    listener = _Listener(found, names)
    for one in found:
        one.layer.register_forward_pre_hook(listener.enter)
        one.layer.register_forward_hook(listener.leaver(one), with_kwargs=True)
    try:
        with torch.no_grad(), _Overhear(listener):
            model(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        raise DiscoveryError(
            f"{type(model).__name__} does not run on the example input of shape {shapes}: "
            f"{type(error).__name__}: {error}. Pass example_inputs= with what its forward takes."
        ) from error
    return listener


def _site(found: _Found, listener: _Listener) -> ConvSite:
    layer, conv = found.layer, cast("nn.Conv2d", found.layer)
    if isinstance(layer, nn.Linear):
        shape: dict[str, Any] = {"in_channels": layer.in_features, "out_channels": layer.out_features}
        shape |= {"kernel_size": (), "groups": 1, "transposed": False}
    else:
        names = ("in_channels", "out_channels", "kernel_size", "groups", "transposed")
        shape = {name: getattr(conv, name) for name in names}
    site = ConvSite(
        name=found.names[0],
        kind=type(layer).__name__,
        **shape,
        positions_in=0,
        positions_out=0,
        calls=0,
        found_by=found.found_by,
        aliases=found.names[1:],
        has_bias=layer.bias is not None,
    )
    site = _with_calls(site, listener.calls[site.name])
    reason = handlers.skip_reason(layer) or _shape_reason(site, layer) or _use_reason(site, found, listener)
    return replace(site, skip_reason=reason)


def _with_calls(site: ConvSite, calls: _Calls) -> ConvSite:
    return replace(site, positions_in=calls.positions_in, positions_out=calls.positions_out, calls=calls.calls)


def _shape_reason(site: ConvSite, layer: nn.Module) -> str | None:
    """Why a layer of this shape stays dense."""
    if min(site.group_in_channels, site.group_out_channels) == 1 and site.groups > 1:
        return f"depthwise (groups={site.groups})"
    if min(site.group_in_channels, site.group_out_channels) == 1 and site.is_pointwise:
        return f"rank 1 already ({site.in_channels} to {site.out_channels} channels)"
    if isinstance(getattr(layer, "padding", None), str) and prod(site.kernel_size) > 1:
        return f'fvcore counts no flops for padding="{layer.padding}", so no budget could be checked'
    return None


def _use_reason(site: ConvSite, found: _Found, listener: _Listener) -> str | None:
    """Why a layer that is used like this stays dense."""
    if not site.name:
        return "is the model itself; wrap it in nn.Sequential"
    if found.sharers:
        return f"weight shared with {found.sharers[0]!r}"
    if site.name in listener.used_directly:
        return "its weight is also used directly, outside the layer"
    return None if site.calls else "never called on the example input"


def _refuse_lazy(model: nn.Module) -> None:
    """A run would initialize lazy layers, and the model would not be the same afterwards."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise DiscoveryError(
                f"{type(model).__name__} is not initialized yet ({name!r} is lazy); run it once first."
            )


def _nothing_found(model: nn.Module, layers: str) -> DiscoveryError:
    linear = layers == "conv" and any(isinstance(module, nn.Linear) for module in model.modules())
    kinds = "convolution" if layers == "conv" else "convolution or linear layer"
    hint = 'Use layers="conv+linear" for its linear layers.' if linear else "Pass the network that holds some."
    return DiscoveryError(
        f"{type(model).__name__} has no {kinds} among its {len(list(model.modules()))} modules. {hint}"
    )


def _patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _select(sites: Sequence[ConvSite], include: Sequence[str], exclude: Sequence[str]) -> tuple[ConvSite, ...]:
    for pattern in (*include, *exclude):
        if not any(_matches(site, pattern) for site in sites):
            close = difflib.get_close_matches(pattern, [site.name for site in sites], n=3, cutoff=0.4)
            raise SelectionError(
                f"pattern {pattern!r} matches none of the {len(sites)} sites. "
                f"Close names: {', '.join(close or [site.name for site in sites[:3]])}."
            )
    return tuple(replace(site, skip_reason=site.skip_reason or _deselected(site, include, exclude)) for site in sites)


def _matches(site: ConvSite, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (site.name, *site.aliases))


def _deselected(site: ConvSite, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    for pattern in exclude:
        if _matches(site, pattern):
            return f"excluded by {pattern!r}"
    if include and not any(_matches(site, pattern) for pattern in include):
        return "not included"
    return None


class DiscoverConvolutions(PassBase):
    """Discovery for those who hold a `torch.fx.GraphModule`: a graph pass that marks the nodes.

    Every `call_module` node of a convolution gets `node.meta["batude_fx"]`, its `ConvSite`.

    Args:
        example_inputs: Arguments of one run of the graph module.
    """

    def __init__(self, example_inputs: tuple[object, ...]) -> None:
        super().__init__()
        self.example_inputs = example_inputs

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Mark the nodes; a second application changes nothing."""
        sites = {
            name: site for site in discover(graph_module, self.example_inputs) for name in (site.name, *site.aliases)
        }
        modified = False
        for node in graph_module.graph.nodes:
            site = sites.get(str(node.target)) if node.op == "call_module" else None
            if site is not None and node.meta.get("batude_fx") != site:
                node.meta["batude_fx"] = site
                modified = True
        return PassResult(graph_module, modified=modified)
