"""Find every convolution of a model, with the sizes its cost depends on and, where it must stay dense, the reason.

The module tree lists the layers, and a trace by torch.fx says which of them the forward pass calls as modules. One run
of the example input then gives every site its sizes and calls, finds convolutions that are called as functions, and
shows which weights are used without their layer. The only file that imports torch.fx.

Source: torchvision's `feature_extraction`, for a tracer with chosen leaf modules; timm's lists of modules and functions
that must not be traced.
"""

import difflib
import inspect
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any, cast

from timm.layers import get_notrace_functions, get_notrace_modules  # type: ignore[attr-defined]
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from batude_fx.errors import DiscoveryError, SelectionError
from batude_fx.graph.call_recorder import CallRecorder, LayerEntry, record_calls, with_calls
from batude_fx.graph.example_inputs import resolve_inputs
from batude_fx.graph.site_table import Sites
from batude_fx.graph.sites import ConvSite, FoundBy
from batude_fx.graph.surgery import refuse_links
from batude_fx.support.inputs import ExampleInputs
from batude_fx.support.model_state import exclusive, private_copy
from batude_fx.tucker import dense_layers
from batude_fx.tucker.modules import TuckerModule

PART_OF_TUCKER = "is part of a Tucker module already"
"""The reason why a layer of a compressed network stays as it is."""
_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {"conv": (_ConvNd,), "conv+linear": (_ConvNd, nn.Linear)}


def discover(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    layers: str = "conv",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> Sites:
    """List every convolution of a model, each replaceable or with the reason why not.

    Args:
        model: Any module; it is not changed, also when an error is raised.
        example_inputs: Arguments of one run: a single tensor, a tuple of positional arguments, or a dict of keyword
            arguments. By default noise of the size that timm or torchvision gives for the model.
        layers: "conv", or "conv+linear" to list linear layers too.
        include: Glob patterns of qualified names; sites that match none are listed, with that as the reason to stay
            dense.
        exclude: Glob patterns; sites that match one are listed, with that as the reason to stay dense.

    Returns:
        The sites, a tuple that prints as a table, in the order of their first call; sites without a call come last. A
        convolution that is called as a function is listed under the name of its weight or, if the weight has no name,
        under the name of the function and the shape of the weight.

    Raises:
        DiscoveryError: The model has no such layer, or does not run on the example input.
        SelectionError: A pattern matches no site, or `layers` is neither of its two values.
        UnsupportedError: A function that the model holds leads back to the model, so that no copy of it could be used.

    Source: torch.fx, with the tracer of torchvision's `feature_extraction` and timm's lists of what not to trace.
    """
    if layers not in _LAYERS:
        raise SelectionError(f"layers={layers!r} is not known; use one of {', '.join(map(repr, _LAYERS))}.")
    _refuse_lazy(model)
    refuse_links(model)
    with private_copy(model) as copied:
        entries = _find_layers(copied, _LAYERS[layers])
        if not entries and example_inputs is None:
            raise _no_sites_error(model, layers)
        recorder = record_calls(copied, entries, resolve_inputs(model, example_inputs))
    # After the run, so that caches which outlive the copy hold values, and no proxies of the tracer.
    with private_copy(model) as to_trace:
        called_modules = _called_modules(to_trace, _LAYERS[layers])
    sites = [*(_site(entry, _found_by(entry, called_modules), recorder) for entry in entries)]
    sites += recorder.functional_sites()
    if not sites:
        raise _no_sites_error(model, layers)
    sites.sort(key=lambda site: recorder.counts[site.name].first_call)
    sizes_vary = recorder.sizes_vary or "child" in called_modules.values()
    return Sites(_apply_patterns(sites, _patterns(include), _patterns(exclude)), sizes_vary=sizes_vary)


class _Tracer(fx.Tracer):
    """A tracer whose leaves are the layers of some classes, and the modules that timm says must not be traced."""

    def __init__(self, layer_types: tuple[type[nn.Module], ...]) -> None:
        functions = get_notrace_functions()  # type: ignore[no-untyped-call]
        super().__init__(autowrap_functions=tuple(functions), param_shapes_constant=True)
        self._leaves = (*layer_types, *get_notrace_modules())  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def trace_privately(self, root: nn.Module) -> fx.Graph:
        """Return the graph of a module, while all other modules of the process do what they always do.

        `fx.Tracer.trace` patches `nn.Module.__call__` and `__getattr__` for the whole process, so that a model that
        another thread runs meanwhile would fail. Here the same function is called with another `_new_patcher`.
        """
        original: Any = inspect.unwrap(fx.Tracer.trace)  # torch.compile wraps it
        namespace = {**vars(_symbolic_trace), "_new_patcher": lambda: _PatcherOfModules(root)}
        trace = FunctionType(original.__code__, namespace, argdefs=original.__defaults__, closure=original.__closure__)
        graph: fx.Graph = trace(self, root)
        return graph


class _PatcherOfModules(_symbolic_trace._Patcher):  # noqa: SLF001 - there is no public way
    """Patches methods of `nn.Module` for the modules of one network only, which get a subclass of their class."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._root = root
        self._own_classes: dict[nn.Module, type] = {}
        self._subclasses: dict[type, type] = {}

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:  # noqa: FBT001, FBT002
        if cls is not nn.Module:
            super().patch_method(cls, name, new_fn, deduplicate)
            return
        for module in self._root.modules():
            own = self._own_classes.setdefault(module, type(module))
            if own not in self._subclasses:
                self._subclasses[own] = _subclass(own)
            object.__setattr__(module, "__class__", self._subclasses[own])
        for own, subclass in self._subclasses.items():
            if getattr(own, name) is getattr(nn.Module, name):  # else it has a method of its own
                type.__setattr__(subclass, name, new_fn)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[arg-type]
        for module, own in self._own_classes.items():
            object.__setattr__(module, "__class__", own)


class _Unnoticed(nn.Module):
    """Comes before a class of the user's in the bases of a subclass, whose `__init_subclass__` is then not called."""

    def __init_subclass__(cls) -> None:
        """Take no keywords, and note the class in no registry."""


def _subclass(own: type) -> type:
    """Return a subclass of a class of modules; neither the class nor its metaclass takes notice of it."""
    metaclass: Any = ABCMeta if isinstance(own, ABCMeta) else type
    subclass: type = metaclass.__new__(type(own), own.__name__, (_Unnoticed, own), {"__module__": own.__module__})
    return subclass


def _find_layers(model: nn.Module, layer_types: tuple[type[nn.Module], ...]) -> list[LayerEntry]:
    """Return every layer in the module tree."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    owners: dict[int, list[str]] = {}
    for module, (name, *_) in names.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    parent_reasons = _parent_reasons(model)
    entries = []
    for layer, layer_names in names.items():
        if isinstance(layer, layer_types):
            holders = (name for parameter in layer.parameters(recurse=False) for name in owners[id(parameter)])
            parameter_sharers = tuple(name for name in holders if name != layer_names[0])
            entries.append(LayerEntry(layer, tuple(layer_names), parameter_sharers, parent_reasons.get(layer)))
    return entries


def _parent_reasons(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers that cannot be replaced because of the module that they belong to, and the reasons."""
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, TuckerModule):
            reasons |= dict.fromkeys(module.children(), PART_OF_TUCKER)
        elif isinstance(module, nn.TransformerEncoderLayer):
            reason = "TransformerEncoderLayer reads its weight instead of calling it"
            reasons |= dict.fromkeys((module.linear1, module.linear2), reason)
    return reasons


def _found_by(entry: LayerEntry, called_modules: Mapping[str, str]) -> FoundBy:
    """Return how the traced graph reaches a layer."""
    reached = (how for name in entry.names if (how := _reached_by(name, called_modules)))
    return cast("FoundBy", next(reached, "tree"))


def _reached_by(name: str, called_modules: Mapping[str, str]) -> str | None:
    """Return how the graph reaches a layer, as a node of its own or inside a leaf module; None where it does not."""
    if name in called_modules:
        return called_modules[name]
    parents = (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
    return "leaf" if any(parent in called_modules for parent in parents) else None


def _called_modules(model: nn.Module, layer_types: tuple[type[nn.Module], ...]) -> dict[str, str]:
    """Trace the model or, where that fails, its children, as deep as needed.

    Args:
        model: A private copy, whose hooks are removed, as they may belong to the original.
        layer_types: Classes that are leaves of the graph.

    Returns:
        Qualified name of every module that is a node of a graph: to "fx" if the whole model was traced, else "child".
    """
    called_modules: dict[str, str] = {}
    for part in model.modules():
        part._forward_hooks.clear()  # noqa: SLF001 - there is no public way
        part._forward_pre_hooks.clear()  # noqa: SLF001
    queue: list[tuple[str, nn.Module]] = [("", model)]
    while queue:
        prefix, module = queue.pop()
        if not any(isinstance(part, layer_types) for part in module.modules()):
            continue
        if isinstance(module, layer_types):
            called_modules[prefix.rstrip(".")] = "child" if prefix else "fx"
        elif (graph := _trace(module, layer_types)) is None:
            queue += [(f"{prefix}{name}.", child) for name, child in module.named_children()]
        else:
            nodes = (node for node in graph.nodes if node.op == "call_module")
            called_modules |= {f"{prefix}{node.target}": "child" if prefix else "fx" for node in nodes}
    return called_modules


def _trace(module: nn.Module, layer_types: tuple[type[nn.Module], ...]) -> fx.Graph | None:
    """Return the graph of a module, or None where it cannot be traced."""
    try:
        with exclusive, warnings.catch_warnings():
            # The user asked for a list of layers; warnings about tracing would only confuse.
            warnings.simplefilter("ignore")
            return _Tracer(layer_types).trace_privately(module)
    except Exception:  # noqa: BLE001 - tracing runs the model's own code, which may fail in any way
        return None


def _site(entry: LayerEntry, found_by: FoundBy, recorder: CallRecorder) -> ConvSite:
    """Return the site of a layer, with its calls and, where it must stay dense, the reason."""
    layer, conv = entry.layer, cast("nn.Conv2d", entry.layer)
    if isinstance(layer, nn.Linear):
        shape: dict[str, Any] = {"in_channels": layer.in_features, "out_channels": layer.out_features}
        shape |= {"kernel_size": (), "groups": 1, "transposed": False}
    else:
        names = ("in_channels", "out_channels", "kernel_size", "groups", "transposed")
        shape = {name: getattr(conv, name) for name in names}
    site = ConvSite(
        name=entry.names[0],
        kind=type(layer).__name__,
        **shape,
        positions_in=0,
        positions_out=0,
        calls=0,
        found_by=found_by,
        aliases=entry.names[1:],
        has_bias=layer.bias is not None,
    )
    site = with_calls(site, recorder.counts[site.name])
    reason = dense_layers.skip_reason(layer) or _shape_reason(site, layer) or _use_reason(site, entry, recorder)
    if reason:
        return replace(site, skip_reason=reason)
    own_flops, own_params = dense_layers.own_cost(layer)
    return replace(site, own_flops=site.calls * own_flops, own_params=own_params)


def _shape_reason(site: ConvSite, layer: nn.Module) -> str | None:
    """Return the reason why a layer of this shape stays dense, or None."""
    if min(site.group_in_channels, site.group_out_channels) == 1 and site.groups > 1:
        return "depthwise, nothing to decompose"
    if min(site.group_in_channels, site.group_out_channels) == 1 and site.is_pointwise:
        return "rank 1 already, nothing to decompose"
    # With other padding modes torch pads first, and then calls a convolution with padding 0, which fvcore counts.
    if isinstance(getattr(layer, "padding", None), str) and getattr(layer, "padding_mode", "") == "zeros":
        return f'fvcore counts no flops for padding="{layer.padding}", so no budget could be checked'
    return None


def _use_reason(site: ConvSite, entry: LayerEntry, recorder: CallRecorder) -> str | None:
    """Return the reason why a layer stays dense because of how the model uses it, or None."""
    if not site.name:
        return "is the model itself; wrap it in nn.Sequential"
    if entry.parent_reason:
        return entry.parent_reason
    if entry.parameter_sharers:
        return f"shares a parameter with {entry.parameter_sharers[0]!r}"
    if site.name in recorder.used_directly:
        return "its weight is also used directly, outside the layer"
    return None if site.calls else "never called on the example input"


def _refuse_lazy(model: nn.Module) -> None:
    """Refuse a model with lazy layers: a run would initialize them, and so change the model."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise DiscoveryError(
                f"{type(model).__name__} is not initialized yet ({name!r} is lazy); run it once first."
            )


def _no_sites_error(model: nn.Module, layers: str) -> DiscoveryError:
    """Return the error for a model without layers of the kinds that are listed."""
    linear = layers == "conv" and any(isinstance(module, nn.Linear) for module in model.modules())
    kinds = "convolution" if layers == "conv" else "convolution or linear layer"
    hint = 'Use layers="conv+linear" for its linear layers.' if linear else "Pass the network that holds some."
    return DiscoveryError(
        f"{type(model).__name__} has no {kinds} among its {len(list(model.modules()))} modules. {hint}"
    )


def _patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _apply_patterns(sites: Sequence[ConvSite], include: Sequence[str], exclude: Sequence[str]) -> Iterator[ConvSite]:
    """Set the reason to stay dense of sites that the patterns leave out; refuse a pattern that matches no site."""
    for pattern in (*include, *exclude):
        if not any(_matches(site, pattern) for site in sites):
            close_names = difflib.get_close_matches(pattern, [site.name for site in sites], n=3, cutoff=0.4)
            raise SelectionError(
                f"pattern {pattern!r} matches none of the {len(sites)} sites. "
                f"Close names: {', '.join(close_names or [site.name for site in sites[:3]])}."
            )
    return (replace(site, skip_reason=site.skip_reason or _pattern_reason(site, include, exclude)) for site in sites)


def _matches(site: ConvSite, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (site.name, *site.aliases))


def _pattern_reason(site: ConvSite, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Return the reason why the patterns leave out a site, or None."""
    for pattern in exclude:
        if _matches(site, pattern):
            return f"excluded by {pattern!r}"
    if include and not any(_matches(site, pattern) for pattern in include):
        return "not included"
    return None
