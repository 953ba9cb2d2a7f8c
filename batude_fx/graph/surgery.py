"""Replace modules in a copy of a model, under all of their names; everything else is copied unchanged.

The copy is made by `copy.deepcopy`, whose memo already holds the new modules as the copies of the old ones. So shared
modules stay shared, references from parents, lists and bound hooks all lead to the replacement, and the weights of
replaced modules are never copied.
"""

import copy
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

from torch import nn

from batude_fx.errors import BatudeError, SelectionError, UnsupportedError
from batude_fx.support.model_state import exclusive
from batude_fx.tucker.modules import TuckerModule, build
from batude_fx.tucker.ranks import Ranks

ModelT = TypeVar("ModelT", bound=nn.Module)
_FUSING = ("fuse", "reparameterize", "switch_to_deploy")  # what timm.utils.reparameterize_model calls
_WRAPPERS = {
    "DataParallel": "its `module`",
    "DistributedDataParallel": "its `module`",
    "OptimizedModule": "its `_orig_mod`, then torch.compile the result",
    "RecursiveScriptModule": "the model that it was scripted from",
    "TopLevelTracedModule": "the model that it was traced from",
}


def replace_modules(model: ModelT, modules: Mapping[str, nn.Module]) -> ModelT:
    """Return a deep copy of the model with some submodules replaced, under all of their names.

    Hooks of the model and of other submodules are copied, and so are `training` flags and shared parameters. Hooks of
    a replaced module are lost (`dense_layers.skip_reason` refuses layers that have some).

    Args:
        model: Any module; it is not changed, also when an error is raised.
        modules: Qualified name to new module. The new modules themselves are inserted, not copies. Of a module with
            several names, one is enough.

    Returns:
        A model of the same class.

    Raises:
        SelectionError: When the model has no submodule of a name, or two modules would replace the same submodule.
        BatudeError: When the model cannot be copied, or the copy does not contain a replacement.
    """
    old_modules = _named_modules(model, modules)
    new_of: dict[int, nn.Module] = {}
    for name, new in modules.items():
        if new_of.setdefault(id(old_modules[name]), new) is not new:
            raise SelectionError(f"{name!r} is another name of a module that is replaced already; give one of them.")
    # deepcopy adds its own entries, of other types, to the memo it is given.
    replaced = copy_model(model, {**new_of})
    for name, new in modules.items():
        new.train(old_modules[name].training)
    _refuse_fusing_(replaced)
    _check_replaced(replaced, {name: new_of[id(old)] for name, old in old_modules.items() if id(old) in new_of})
    return replaced


def copy_model(model: ModelT, memo: dict[int, Any] | None = None) -> ModelT:
    """Return a deep copy of the model.

    Args:
        model: Any module.
        memo: The memo of `copy.deepcopy`, `id` of an object to its copy.

    Raises:
        BatudeError: When a part of the model cannot be copied, or a function in it closes over its modules.
    """
    try:
        with exclusive:  # another thread may hold the model in eval mode, with hooks
            copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the model's parts raise
        raise BatudeError(
            f"{type(model).__name__} cannot be copied: {error}. Undo torch's older weight_norm and prune "
            "(`remove_weight_norm`, `prune.remove`), detach other tensors that are the result of a computation "
            "(`tensor.detach()`), and drop handles to files, locks and processes, then try again."
        ) from error
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():  # graph modules are in training mode after a copy
        module.training = flags.get(name, module.training)
    _refuse_links(copied, model)
    return copied


def _refuse_links(copied: nn.Module, model: nn.Module) -> None:
    """Refuse a copy that holds functions which would go on to use the original.

    `copy.deepcopy` copies bound methods, but neither functions nor weak references: what they close over, or refer to,
    stays that of the original. Modules that rebuild such functions in their copies, as torchmetrics' do, pass.

    Raises:
        UnsupportedError: When an attribute or a hook of a module is such a function.
    """
    originals = {id(module) for module in model.modules()} - {id(module) for module in copied.modules()}
    for module in model.modules():
        originals |= {id(value) for value in vars(module).values() if isinstance(value, dict | list | deque | set)}
    for name, module in copied.named_modules():
        for attribute, value in vars(module).items():
            held = _held_by_functions(value, of_hooks=attribute.endswith("hooks"))
            if attribute != "_compiled_call_impl" and not originals.isdisjoint(map(id, held)):
                raise UnsupportedError(
                    f"{'.'.join(filter(None, (name, attribute.strip('_'))))} is or holds a function that closes over "
                    f"modules or attributes of {type(model).__name__}, so a copy would go on to use those of the "
                    "original. Make it a method that takes what it needs from self."
                )


def _held_by_functions(value: object, *, of_hooks: bool) -> Iterator[object]:
    """Yield what the functions in an attribute hold: what they close over, are bound to, or refer to, at any depth.

    A list or dict that a hook closes over is not looked into: hooks note in it which modules they saw.
    """
    queue, visited = deque([(value, False)]), set[int]()
    while queue:
        item, inside_function = queue.popleft()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if inside_function:
            yield item
        if isinstance(item, FunctionType):
            queue += ((inner, True) for inner in _variables(item))
        elif isinstance(item, MethodType):
            queue += [(item.__func__, inside_function), (item.__self__, True)]
        elif isinstance(item, partial):
            queue += ((inner, inside_function) for inner in (item.func, *item.args, *item.keywords.values()))
        elif isinstance(item, weakref.ref):
            queue.append((item(), True))
        elif isinstance(item, dict | list | tuple | set | deque) and not (of_hooks and inside_function):
            queue += ((inner, inside_function) for inner in (item.values() if isinstance(item, dict) else item))


def _variables(function: FunctionType) -> Iterator[object]:
    """Yield what a function closes over, its default arguments, and the global variables that it names."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    yield from (value for value in named if isinstance(value, nn.Module | MethodType | partial))


def refuse_wrappers(model: nn.Module, verb: str) -> None:
    """Refuse wrappers such as `DataParallel`, in which layers have other names or cannot be replaced.

    Args:
        model: Any module.
        verb: For the message, what the user should do with the wrapped model instead, such as "save".

    Raises:
        UnsupportedError: When the model is a wrapper.
    """
    if wrapped := _WRAPPERS.get(type(model).__name__):
        raise UnsupportedError(f"{type(model).__name__} hides the layers of a network; {verb} {wrapped}.")
    for name, module in model.named_modules():
        if wrapped := _WRAPPERS.get(type(module).__name__):
            raise UnsupportedError(
                f"{name!r} is of class {type(module).__name__}, which hides its layers. Put "
                f"{wrapped.partition(',')[0]} in its place, {verb} the model, then wrap the part again."
            )


def build_skeleton(model: ModelT, ranks: Mapping[str, Ranks], biased: Collection[str] = ()) -> ModelT:
    """Return a deep copy of the model with sites in uninitialised Tucker form, ready to load a `state_dict`.

    Args:
        model: The dense model; it is not changed.
        ranks: Site name to its ranks, per group.
        biased: Names of the sites that get a bias even where the dense layer has none.

    Raises:
        SelectionError: When the model has no submodule of a name.
        UnsupportedError: When a site cannot be replaced exactly, or the ranks do not fit it.
        BatudeError: When the model cannot be copied.
    """
    layers = _named_modules(model, ranks)
    return replace_modules(model, {name: build(layers[name], r, add_bias=name in biased) for name, r in ranks.items()})


def _named_modules(model: nn.Module, required_names: Collection[str]) -> dict[str, nn.Module]:
    """Return all submodules under all of their names; refuse a required name that is not among them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := [name for name in required_names if name not in modules]:
        raise SelectionError(f"{type(model).__name__} has no submodule {missing[0]!r}; see model.named_modules().")
    return modules


def _refuse_fusing_(model: nn.Module) -> None:
    """Make the fusing methods of blocks that hold Tucker modules raise an error.

    They would replace the Tucker modules by dense layers again, and lose their biases.
    """
    for module in model.modules():
        fusing = [name for name in _FUSING if hasattr(type(module), name)]
        if fusing and any(isinstance(part, TuckerModule) for part in module.modules()):
            vars(module).update(dict.fromkeys(fusing, _raise_cannot_fuse))


def _raise_cannot_fuse(*_: object, **__: object) -> None:
    raise UnsupportedError(
        "a compressed block cannot be fused. Compress timm.utils.reparameterize_model(model) instead, or use "
        "batude_fx.fold(small), which folds the batch-norms."
    )


def _check_replaced(replaced: nn.Module, expected: Mapping[str, nn.Module]) -> None:
    """Refuse a copy that does not contain the expected modules, name to module."""
    modules = dict(replaced.named_modules(remove_duplicate=False))
    for name, module in expected.items():
        if modules.get(name) is not module:
            raise BatudeError(
                f"the copy of {type(replaced).__name__} does not hold the replacement at {name!r}: it lies inside "
                "another replaced module, or a parent has a __deepcopy__ that ignores its memo. Exclude that name."
            )
