"""Find every convolution of a model, with what its cost depends on and, where it must stay dense, the reason.

The traced graph finds convolutions; the module tree is the safety net for what the graph cannot see. One run of the
example input then gives every site its sizes and its calls, and shows which weights are used without their layer.
The only module that imports torch.fx.

Source: torchvision's `feature_extraction` (a tracer with chosen leaves), timm's lists of modules and functions that
must not be traced.
"""

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, cast

from timm.layers import get_notrace_functions, get_notrace_modules  # type: ignore[attr-defined]
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from batude_fx.errors import BatudeError, DiscoveryError, SelectionError
from batude_fx.graph.call_recorder import CallRecorder, FoundLayer, record_calls, with_calls
from batude_fx.graph.example_inputs import resolve_inputs
from batude_fx.graph.site_table import Sites
from batude_fx.graph.sites import ConvSite, FoundBy
from batude_fx.graph.surgery import copy_model
from batude_fx.support.model_state import eval_and_restore
from batude_fx.tucker import dense_layers
from batude_fx.tucker.modules import TuckerModule

_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {"conv": (_ConvNd,), "conv+linear": (_ConvNd, nn.Linear)}


def discover(
    model: nn.Module,
    example_inputs: Tensor | tuple[object, ...] | None = None,
    *,
    layers: str = "conv",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> Sites:
    """List every convolution of a model, each replaceable or with the reason why not.

    Args:
        model: Any module; it is bit-identical afterwards, also when an error is raised.
        example_inputs: Arguments of one run. By default what timm or torchvision knows of the model.
        layers: "conv", or "conv+linear" to list linear layers too.
        include: Globs over qualified names; sites that match none are listed as not included.
        exclude: Globs; sites that match one are listed as excluded.

    Returns:
        The sites, a tuple that prints as a table, in the order of their first call; those that are never called come
        last. A convolution that is called as a function is listed too, under the name of its weight or, where that has
        none, its shape.

    Raises:
        DiscoveryError: The model has no such layer, or does not run on the example input.
        SelectionError: A pattern matches no site, or `layers` is neither of its two values.

    Source: torch.fx, with the tracer of torchvision's `feature_extraction` and timm's lists of what not to trace.
    """
    if layers not in _LAYERS:
        raise SelectionError(f"layers={layers!r} is not known; use one of {', '.join(map(repr, _LAYERS))}.")
    _refuse_lazy(model)
    with eval_and_restore(model):
        called = _called_modules(model, _LAYERS[layers])
        found = _find(model, _LAYERS[layers], called)
        if not found and example_inputs is None:
            raise _nothing_found(model, layers)
        listener = record_calls(model, found, resolve_inputs(model, example_inputs))
    sites = [*(_site(layer, listener) for layer in found), *listener.functional_sites()]
    if not sites:
        raise _nothing_found(model, layers)
    sites.sort(key=lambda site: listener.calls[site.name].first_call)
    sizes_vary = listener.selects or "child" in called.values()
    return Sites(_selected(sites, _patterns(include), _patterns(exclude)), sizes_vary=sizes_vary)


class _Tracer(fx.Tracer):
    """Stops at the wanted layers and at what timm says must not be traced."""

    def __init__(self, kinds: tuple[type[nn.Module], ...]) -> None:
        functions = get_notrace_functions()  # type: ignore[no-untyped-call]
        super().__init__(autowrap_functions=tuple(functions), param_shapes_constant=True)
        self._leaves = (*kinds, *get_notrace_modules())  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def _find(model: nn.Module, kinds: tuple[type[nn.Module], ...], called: Mapping[str, str]) -> list[FoundLayer]:
    """Every layer in the module tree; what the graph calls says how it was reached."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    owners: dict[int, list[str]] = {}
    for module, (name, *_) in names.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    places = _places(model)
    found = []
    for layer, own in names.items():
        if isinstance(layer, kinds):
            found_by = next((how for name in own if (how := _reached(name, called))), "tree")
            holders = (name for parameter in layer.parameters(recurse=False) for name in owners[id(parameter)])
            sharers = tuple(name for name in holders if name != own[0])
            found.append(FoundLayer(layer, tuple(own), cast("FoundBy", found_by), sharers, places.get(layer)))
    return found


def _places(model: nn.Module) -> dict[nn.Module, str]:
    """Layers that cannot be replaced where they are, and why."""
    places: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, TuckerModule):
            places |= dict.fromkeys(module.children(), "is part of a Tucker module already")
        elif isinstance(module, nn.TransformerEncoderLayer):
            reason = "TransformerEncoderLayer reads its weight instead of calling it"
            places |= dict.fromkeys((module.linear1, module.linear2), reason)
    return places


def _reached(name: str, called: Mapping[str, str]) -> str | None:
    """How the graph reaches a layer: as a node of its own, or inside a leaf."""
    if name in called:
        return called[name]
    parents = (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
    return "leaf" if any(parent in called for parent in parents) else None


def _called_modules(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, str]:
    """Trace the model or, where that fails, its children, as deep as needed.

    What is traced is a copy with the same tensors and no hooks: proxies would stay in what the user's hooks and the
    model's own caches keep.

    Returns:
        Qualified name of every module that is a node of a graph, to "fx" or "child".
    """
    called: dict[str, str] = {}
    with suppress(BatudeError):  # cannot be copied
        model = copy_model(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    for part in model.modules():
        part._forward_hooks.clear()  # noqa: SLF001 - `borrowed` puts back those of a model that is no copy
        part._forward_pre_hooks.clear()  # noqa: SLF001
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


def _site(found: FoundLayer, listener: CallRecorder) -> ConvSite:
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
    site = with_calls(site, listener.calls[site.name])
    reason = dense_layers.skip_reason(layer) or _shape_reason(site, layer) or _use_reason(site, found, listener)
    if reason:
        return replace(site, skip_reason=reason)
    own_flops, own_params = dense_layers.own_cost(layer)
    return replace(site, own_flops=site.calls * own_flops, own_params=own_params)


def _shape_reason(site: ConvSite, layer: nn.Module) -> str | None:
    """Why a layer of this shape stays dense."""
    if min(site.group_in_channels, site.group_out_channels) == 1 and site.groups > 1:
        return "depthwise, nothing to decompose"
    if min(site.group_in_channels, site.group_out_channels) == 1 and site.is_pointwise:
        return "rank 1 already, nothing to decompose"
    # Other padding modes pad beforehand, and fvcore sees a convolution with padding 0.
    if isinstance(getattr(layer, "padding", None), str) and getattr(layer, "padding_mode", "") == "zeros":
        return f'fvcore counts no flops for padding="{layer.padding}", so no budget could be checked'
    return None


def _use_reason(site: ConvSite, found: FoundLayer, listener: CallRecorder) -> str | None:
    """Why a layer that is used like this stays dense."""
    if not site.name:
        return "is the model itself; wrap it in nn.Sequential"
    if found.place:
        return found.place
    if found.sharers:
        return f"shares a parameter with {found.sharers[0]!r}"
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


def _selected(sites: Sequence[ConvSite], include: Sequence[str], exclude: Sequence[str]) -> Iterator[ConvSite]:
    for pattern in (*include, *exclude):
        if not any(_matches(site, pattern) for site in sites):
            close = difflib.get_close_matches(pattern, [site.name for site in sites], n=3, cutoff=0.4)
            raise SelectionError(
                f"pattern {pattern!r} matches none of the {len(sites)} sites. "
                f"Close names: {', '.join(close or [site.name for site in sites[:3]])}."
            )
    return (replace(site, skip_reason=site.skip_reason or _deselected(site, include, exclude)) for site in sites)


def _matches(site: ConvSite, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (site.name, *site.aliases))


def _deselected(site: ConvSite, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    for pattern in exclude:
        if _matches(site, pattern):
            return f"excluded by {pattern!r}"
    if include and not any(_matches(site, pattern) for pattern in include):
        return "not included"
    return None
