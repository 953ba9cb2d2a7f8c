"""Find every convolution of a model, with what its cost depends on and, where it must stay dense, the reason.

The traced graph finds convolutions; the module tree is the safety net for what the graph cannot see. One run of the
example input then gives every site its sizes and its calls. The only module that imports torch.fx.

Source: torchvision's `feature_extraction` (a tracer with chosen leaves), timm's lists of modules and functions that
must not be traced.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from batude_fx import handlers
from batude_fx.errors import DiscoveryError, SelectionError
from batude_fx.sites import ConvSite, FoundBy
from batude_fx.zoo import example_inputs as default_inputs

_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {"conv": (_ConvNd,), "conv+linear": (_ConvNd, nn.Linear)}
_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip


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
        model: Any module; it is bit-identical afterwards.
        example_inputs: Arguments of one run. By default what timm or torchvision knows of the model.
        layers: "conv", or "conv+linear" to list linear layers too.
        include: Globs over qualified names; sites that match none are listed as not included.
        exclude: Globs; sites that match one are listed as excluded.

    Returns:
        The sites in the order of their first call; those that are never called come last.

    Raises:
        DiscoveryError: The model has no such layer, or does not run on the example input.
        SelectionError: A pattern matches no site, or `layers` is neither of its two values.
    """
    if layers not in _LAYERS:
        raise SelectionError(f"layers={layers!r} is not known; use one of {', '.join(map(repr, _LAYERS))}.")
    kinds = _LAYERS[layers]
    found = _find(model, kinds)
    measured, functional = _measure(model, found, example_inputs or default_inputs(model))
    if not found and not functional:
        hint = ' Use layers="conv+linear" for its linear layers.' if _has_linear(model, layers) else ""
        raise DiscoveryError(f"{type(model).__name__} has no convolution that could be replaced.{hint}")
    sites = [_site(layer, measured[name]) for name, layer in found.items()]
    sites.sort(key=lambda site: measured[site.name].first_call)
    selected = _select(sites, _patterns(include), _patterns(exclude))
    return (*selected, *(_functional_site(name, calls) for name, calls in functional.items()))


@dataclass(frozen=True)
class _Found:
    """A layer, the names it has, how it was found, and a reason known from the graph why it must stay dense."""

    layer: nn.Module
    names: tuple[str, ...]
    found_by: FoundBy
    reason: str | None


@dataclass
class _Calls:
    """What one run of the example does to a layer."""

    positions_in: int = 0
    positions_out: int = 0
    calls: int = 0
    first_call: float = field(default=float("inf"))


class _Tracer(fx.Tracer):
    """Stops at the wanted layers and at what timm says must not be traced."""

    def __init__(self, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
        self._leaves = (*kinds, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def _find(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, _Found]:
    """First qualified name to layer, for every layer in the module tree; the graph says how it was reached."""
    names: dict[int, list[str]] = {}
    layers: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
    traced = _traced(model, kinds)
    owners = _parameter_owners(layers.values())
    found = {}
    for key, layer in layers.items():
        first = names[key][0]
        found_by = next((how for name in names[key] if (how := _reached(name, traced.leaves))), "tree")
        reason = traced.read_weights.get(id(getattr(layer, "weight", None)))
        shared = [names[other][0] for other in owners[id(layer.weight)] if other != key]
        reason = f"weight shared with {shared[0]!r}" if shared else reason
        found[first] = _Found(layer, tuple(names[key]), cast("FoundBy", found_by), reason)
    return found


def _parameter_owners(layers: Iterable[nn.Module]) -> dict[int, list[int]]:
    owners: dict[int, list[int]] = {}
    for layer in layers:
        owners.setdefault(id(layer.weight), []).append(id(layer))
    return owners


def _reached(name: str, leaves: dict[str, str]) -> str | None:
    """How the graph reaches a layer: as a node of its own, or inside a leaf."""
    if name in leaves:
        return leaves[name]
    parents = (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
    return "leaf" if any(parent in leaves for parent in parents) else None


@dataclass(frozen=True)
class _Traced:
    """What the graphs say.

    Attributes:
        leaves: Qualified name of every module that a graph calls to "fx" or "child".
        read_weights: Identity of every parameter that a graph reads directly, to the reason this gives.
    """

    leaves: dict[str, str]
    read_weights: dict[int, str]


def _traced(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> _Traced:
    """Trace the model or, where that fails, its children, as deep as needed."""
    traced = _Traced({}, {})
    queue: list[tuple[str, nn.Module]] = [("", model)]
    while queue:
        prefix, module = queue.pop()
        if not any(isinstance(part, kinds) for part in module.modules()):
            continue
        if prefix and isinstance(module, kinds):
            traced.leaves[prefix[:-1]] = "child"
            continue
        graph = _graph(module, kinds)
        if graph is None:
            queue += [(f"{prefix}{name}.", child) for name, child in module.named_children()]
            continue
        for node in graph.nodes:
            if node.op == "call_module":
                traced.leaves[f"{prefix}{node.target}"] = "child" if prefix else "fx"
            elif node.op == "get_attr":
                parameter = _attribute(module, str(node.target))
                traced.read_weights[id(parameter)] = "its weight is also read directly by another operation"
    return traced


def _graph(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> fx.Graph | None:
    try:
        return _Tracer(kinds).trace(module)
    except Exception:  # noqa: BLE001 - tracing runs the model's own code, which may fail in any way
        return None


def _attribute(module: nn.Module, path: str) -> object:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name, None)


def _measure(
    model: nn.Module, found: dict[str, _Found], inputs: tuple[object, ...]
) -> tuple[dict[str, _Calls], dict[str, int]]:
    """Run the example once: what it does to every layer, and the convolutions that are called outside any layer."""
    measured = {name: _Calls() for name in found}
    functional = _FunctionalConvolutions()
    order = iter(range(2**31))
    handles = []

    def listen(layer: nn.Module, calls: _Calls) -> None:
        axis = 1 if isinstance(layer, _ConvNd) else -1

        def before(*_: object) -> None:
            functional.depth += 1

        def after(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            functional.depth -= 1
            x = tree_leaves((args, kwargs))[0]
            calls.calls += 1
            calls.first_call = min(calls.first_call, next(order))
            # An input without a batch axis has its channels first.
            axis_in = axis if axis == -1 or x.ndim == len(layer.kernel_size) + 2 else 0  # type: ignore[arg-type]
            calls.positions_in += x.numel() // x.shape[axis_in]
            calls.positions_out += output.numel() // output.shape[axis_in]

        handles.append(layer.register_forward_pre_hook(before))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))

    with _evaluating(model):
        try:
            for name, one in found.items():
                listen(one.layer, measured[name])
            with torch.no_grad(), functional:
                model(*inputs)
        except Exception as error:
            shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            raise DiscoveryError(
                f"{type(model).__name__} does not run on the example input of shape {shapes}: {error}. "
                "Pass example_inputs= with what its forward takes."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    return measured, functional.calls


class _FunctionalConvolutions(TorchFunctionMode):
    """Counts convolutions called as functions, outside any layer that was found."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.calls: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.depth == 0 and func in _FUNCTIONS:
            kwargs = kwargs or {}
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = f"{func.__name__}({', '.join(map(str, weight.shape))})"
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _site(found: _Found, calls: _Calls) -> ConvSite:
    layer = found.layer
    conv = isinstance(layer, _ConvNd)
    site = ConvSite(
        name=found.names[0],
        kind=type(layer).__name__,
        in_channels=cast("int", layer.in_channels if conv else layer.in_features),
        out_channels=cast("int", layer.out_channels if conv else layer.out_features),
        kernel_size=tuple(layer.kernel_size) if conv else (),
        groups=layer.groups if conv else 1,
        transposed=layer.transposed if conv else False,
        positions_in=calls.positions_in,
        positions_out=calls.positions_out,
        calls=calls.calls,
        found_by=found.found_by,
        aliases=found.names[1:],
        has_bias=layer.bias is not None,
    )
    return replace(site, skip_reason=_skip_reason(site, found))


def _skip_reason(site: ConvSite, found: _Found) -> str | None:
    layer = found.layer
    if is_lazy(layer.weight):
        return "not initialized yet; run the model once"
    if reason := handlers.skip_reason(layer):
        return reason
    if min(site.group_in_channels, site.group_out_channels) == 1 and site.groups > 1:
        return f"depthwise (groups={site.groups})"
    if min(site.group_in_channels, site.group_out_channels) == 1 and site.is_pointwise:
        return f"rank 1 already ({site.in_channels} to {site.out_channels} channels)"
    if isinstance(getattr(layer, "padding", None), str) and prod(site.kernel_size) > 1:
        return f'fvcore counts no flops for padding="{layer.padding}", so no budget could be checked'
    if site.calls == 0:
        return "never called on the example input"
    return found.reason


def _functional_site(name: str, calls: int) -> ConvSite:
    return ConvSite(
        name=name, kind="function", in_channels=0, out_channels=0, kernel_size=(), groups=1, transposed=False,
        positions_in=0, positions_out=0, calls=calls, found_by="tree",
        skip_reason="functional convolution: its weight is no layer's that could be replaced",
    )  # fmt: skip


def _has_linear(model: nn.Module, layers: str) -> bool:
    return layers == "conv" and any(isinstance(module, nn.Linear) for module in model.modules())


def _patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _select(sites: Sequence[ConvSite], include: Sequence[str], exclude: Sequence[str]) -> list[ConvSite]:
    for pattern in (*include, *exclude):
        if not any(_matches(site, pattern) for site in sites):
            close = difflib.get_close_matches(pattern, [site.name for site in sites], n=3, cutoff=0.4)
            raise SelectionError(
                f"pattern {pattern!r} matches none of the {len(sites)} sites. "
                f"Close names: {', '.join(close or [site.name for site in sites[:3]])}."
            )
    return [replace(site, skip_reason=site.skip_reason or _deselected(site, include, exclude)) for site in sites]


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
        """Mark the nodes; the graph itself is not changed."""
        sites = {
            name: site for site in discover(graph_module, self.example_inputs) for name in (site.name, *site.aliases)
        }
        nodes = [node for node in graph_module.graph.nodes if node.op == "call_module" and node.target in sites]
        for node in nodes:
            node.meta["batude_fx"] = sites[node.target]
        return PassResult(graph_module, modified=bool(nodes))
