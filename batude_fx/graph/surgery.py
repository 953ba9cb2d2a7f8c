"""Replace modules in a copy of a model, under all of their names; everything else is copied unchanged.

The copy is made by `copy.deepcopy`, whose memo already holds the new modules as the copies of the old ones. So shared
modules stay shared, references from parents, lists and bound hooks all lead to the replacement, and the weights of
replaced modules are never copied.
"""

import dis
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from batude_fx.errors import BatudeError, SelectionError, UnsupportedError
from batude_fx.support.model_state import deep_copy
from batude_fx.tucker.modules import TuckerModule, build
from batude_fx.tucker.ranks import Ranks

ModelT = TypeVar("ModelT", bound=nn.Module)
_MOST_OBJECTS = 100_000  # a model may hold the whole program, as a Lightning module holds its trainer
_ATOMS = (str, bytes, int, float, complex, type, type(None), ModuleType, BuiltinFunctionType)
_FUSING = ("fuse", "reparameterize", "switch_to_deploy")  # as timm's reparameterize_model and YOLO's predict call them
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
    _leave_unfused_(replaced, {*new_of.values()})
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
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if type(value) in weakref.ProxyTypes:  # deepcopy would make a second copy of what it stands for
                raise UnsupportedError(
                    f"{'.'.join(filter(None, (name, attribute)))} is a weakref.proxy, which cannot be copied; use "
                    "weakref.ref, and set it anew in the copy."
                )
    memo = {} if memo is None else memo
    copied = deep_copy(model, memo)
    _refuse_links(copied, model, memo)
    return copied


def refuse_links(model: nn.Module) -> None:
    """Refuse a model whose copy would go on to use it, before anything is computed on copies.

    Raises:
        UnsupportedError: When an attribute or a hook of a module is a function that leads back to the model.
    """
    copy_model(model, {id(parameter): parameter for parameter in model.parameters()})


def _refuse_links(copied: nn.Module, model: nn.Module, memo: Mapping[int, object]) -> None:
    """Refuse a copy that holds functions which would go on to use the original.

    `copy.deepcopy` copies bound methods, but neither functions nor weak references: what they close over, or refer to,
    stays that of the original. Modules that rebuild such functions in their copies, as torchmetrics' do, pass.

    Args:
        copied: The copy.
        model: The original.
        memo: The memo of `copy.deepcopy`: `id` of every object of the original that was copied, to its copy.

    Raises:
        UnsupportedError: When an attribute or a hook of a module is such a function.
    """
    originals = {key for key, value in memo.items() if id(value) != key and key != id(memo)}
    modules = {id(module) for module in model.modules()} - {id(module) for module in copied.modules()}
    values = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())} - {None}
    for name, module in copied.named_modules():
        for attribute, value in vars(module).items():
            for held, is_listed in _held_by_functions(value):
                notes = attribute.endswith("hooks") and is_listed  # hooks note in a list which modules they saw
                if isinstance(held, nn.Module):
                    is_original = id(held) in modules and not notes
                else:
                    is_original = id(held) in originals and _may_hold_results(held)
                if is_original or storage_of(held) in values:
                    raise UnsupportedError(
                        f"{'.'.join(filter(None, (name, attribute.strip('_'))))} is or holds a function that closes "
                        f"over {_description(held, model)}, so a copy would go on to use "
                        "that of the original. Make it a method that takes what it needs from self."
                    )


def _description(held: object, model: nn.Module) -> str:
    """Return how to name a part of a model in a message."""
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    name = next((name for name, part in named if part is held and part is not model), "")
    part = f"the {type(held).__name__} {name!r}" if name else f"an object of class {type(held).__name__}"
    return f"the {type(model).__name__}" if held is model else f"{part} of the {type(model).__name__}"


def _may_hold_results(value: object) -> bool:
    """Return whether a forward pass may use an object or fill it; settings, such as numbers and names, are not that."""
    queue, visited = deque([value]), set[int]()
    while queue and len(visited) < _MOST_OBJECTS:
        item = queue.popleft()
        if isinstance(item, nn.Module | Tensor):
            return True
        if id(item) in visited or isinstance(item, _ATOMS):
            continue
        visited.add(id(item))
        inner: Collection[object] = ()
        if isinstance(item, dict | list | tuple | set | deque):
            inner = item.values() if isinstance(item, dict) else item
            if not inner and not isinstance(item, tuple):
                return True
        else:
            with suppress(Exception):  # objects without attributes, or that compute them
                inner = vars(item).values()
        if any(part is None for part in inner):  # a place to fill
            return True
        queue += inner
    return False


def _held_by_functions(value: object) -> Iterator[tuple[object, bool]]:
    """Yield what functions hold that can be reached from an attribute: what they close over, are bound to or refer to.

    Callable objects count as functions. Yielded with each object is whether it lies in a list or dict that is held.
    """
    queue, visited = deque([(value, False, False)]), set[int]()
    while queue and len(visited) < _MOST_OBJECTS:
        item, is_held, is_listed = queue.popleft()
        if id(item) in visited or isinstance(item, _ATOMS):
            continue
        visited.add(id(item))
        if is_held:
            yield item, is_listed
        if isinstance(item, FunctionType):
            queue += ((inner, True, is_listed) for inner in _variables(item))
        elif isinstance(item, MethodType):
            queue += [(item.__func__, is_held, is_listed), (item.__self__, True, is_listed)]
        elif isinstance(item, partial):
            queue += ((inner, is_held, is_listed) for inner in (item.func, *item.args, *item.keywords.values()))
        elif isinstance(item, weakref.ref):
            queue.append((item(), True, is_listed))
        elif isinstance(item, dict | list | tuple | set | deque):
            inner_items = item.values() if isinstance(item, dict) else item
            queue += ((inner, is_held, is_held) for inner in inner_items if not isinstance(inner, _ATOMS))
        elif not isinstance(item, nn.Module | Tensor):
            with suppress(Exception):  # objects without attributes, or that compute them
                queue += ((inner, is_held or callable(item), is_listed) for inner in vars(item).values())


def _variables(function: FunctionType) -> Iterator[object]:
    """Yield what a function closes over, its default arguments, and the global variables that it names."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    named = {entry.argval for entry in dis.get_instructions(function.__code__) if entry.opname == "LOAD_GLOBAL"}
    variables = (function.__globals__.get(name) for name in named)
    yield from (value for value in variables if isinstance(value, nn.Module | MethodType | partial))


def storage_of(value: object) -> int | None:
    """Return the address of the memory of a tensor, which its views share; None where there is none."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return None
    return value.untyped_storage().data_ptr() or None


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


def _leave_unfused_(model: nn.Module, new_modules: Collection[nn.Module]) -> None:
    """Make the fusing methods of blocks that hold replaced modules leave the blocks as they are.

    They were written for the modules that were replaced: they would make dense layers of Tucker modules again, and lose
    their biases, or look for the statistics of batch-norms that are folded.
    """
    for module in model.modules():
        fusing = [name for name in _FUSING if hasattr(type(module), name)]
        if fusing and any(isinstance(part, TuckerModule) or part in new_modules for part in module.modules()):
            vars(module).update(dict.fromkeys(fusing, partial(_as_it_is, module)))  # a partial is copied and pickled


def _as_it_is(module: nn.Module, *_: object, **__: object) -> nn.Module:
    """Return a module, as fusing methods do."""
    return module


def _check_replaced(replaced: nn.Module, expected: Mapping[str, nn.Module]) -> None:
    """Refuse a copy that does not contain the expected modules, name to module."""
    modules = dict(replaced.named_modules(remove_duplicate=False))
    for name, module in expected.items():
        if modules.get(name) is not module:
            raise BatudeError(
                f"the copy of {type(replaced).__name__} does not hold the replacement at {name!r}: it lies inside "
                "another replaced module, or a parent has a __deepcopy__ that ignores its memo. Exclude that name."
            )
