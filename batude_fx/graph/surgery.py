"""Put other modules into a copy of a model: at every name they are known by, with everything else kept.

The copy is `copy.deepcopy` told in advance what the copies of the replaced modules are. So shared modules stay shared,
references from parents, lists and bound hooks all lead to the replacement, and dense weights that are about to
disappear are never copied.
"""

import copy
from collections.abc import Collection, Mapping
from contextlib import suppress
from types import FunctionType
from typing import Any, TypeVar

from torch import nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import BatudeError, SelectionError, UnsupportedError
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
    """A deep copy of the model with some submodules replaced, under all their names.

    Hooks of the model and of untouched submodules come along, and so do `training` flags and shared parameters.
    Hooks of a replaced module go with it (`modules.skip_reason` refuses layers that have some).

    Args:
        model: Any module; it is left as it is, also when an error is raised.
        modules: Qualified name to new module. They are put in as they are, not copied. A module that has several
            names needs one of them.

    Returns:
        A model of the same class.

    Raises:
        SelectionError: When the model has no submodule of that name.
        BatudeError: When the model cannot be copied, or a replacement did not reach the copy.
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
    _check(replaced, {name: new_of[id(old)] for name, old in old_modules.items() if id(old) in new_of})
    return replaced


def copy_model(model: ModelT, memo: dict[int, Any] | None = None) -> ModelT:
    """A deep copy.

    Raises:
        BatudeError: When the model holds what cannot be copied, functions that close over its modules among it.
    """
    _refuse_closures(model)
    try:
        copy_model = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the model's parts raise
        raise BatudeError(
            f"{type(model).__name__} cannot be copied: {error}. Undo torch's older weight_norm and prune "
            "(`remove_weight_norm`, `prune.remove`), detach other tensors that are the result of a computation "
            "(`tensor.detach()`), and drop handles to files, locks and processes, then try again."
        ) from error
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in copy_model.named_modules():  # graph modules come back in training mode
        module.training = flags.get(name, module.training)
    return copy_model


def _refuse_closures(model: nn.Module) -> None:
    """A function is copied as itself, so that one which closes over the model's parts would go on to call the old ones.

    Raises:
        UnsupportedError: When a module has such a function.
    """
    own = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            compiled = attribute == "_compiled_call_impl"  # which torch leaves out of copies
            if isinstance(value, FunctionType) and not compiled and any(id(one) in own for one in _closed_over(value)):
                raise UnsupportedError(
                    f"{'.'.join(filter(None, (name, attribute)))} is a function that closes over modules of "
                    f"{type(model).__name__}, so a copy would go on to call the original ones. Make it a method, "
                    "or bind it by types.MethodType."
                )


def _closed_over(function: FunctionType) -> list[object]:
    """What a function closes over, and what the functions among that do."""
    found: list[object] = []
    functions = [function]
    for one in functions:  # grows meanwhile
        for cell in one.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                leaves = tree_leaves(cell.cell_contents)
                found += [getattr(leaf, "__self__", leaf) for leaf in leaves]
                functions += [leaf for leaf in leaves if isinstance(leaf, FunctionType) and leaf not in functions]
    return found


def refuse_wrappers(model: nn.Module, verb: str) -> None:
    """Say what to take instead of a wrapper, whose layers have other names or none.

    Raises:
        UnsupportedError: When it is one.
    """
    if better := _WRAPPERS.get(type(model).__name__):
        raise UnsupportedError(f"{type(model).__name__} hides the layers of a network; {verb} {better}.")


def build_skeleton(model: ModelT, ranks: Mapping[str, Ranks], biased: Collection[str] = ()) -> ModelT:
    """A deep copy of the model with sites in Tucker form, their weights uninitialised: ready for a `state_dict`.

    Args:
        model: The dense model, left as it is.
        ranks: Site name to its ranks, per group.
        biased: Names of the sites that have a bias although the dense layer may have none.

    Raises:
        SelectionError: When the model has no submodule of that name.
        UnsupportedError: When a site cannot be replaced exactly, or the ranks do not fit it.
        BatudeError: When the model cannot be copied.
    """
    layers = _named_modules(model, ranks)
    return replace_modules(model, {name: build(layers[name], r, add_bias=name in biased) for name, r in ranks.items()})


def _named_modules(model: nn.Module, wanted: Collection[str]) -> dict[str, nn.Module]:
    """All submodules under all their names, after a check that the wanted names are among them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := [name for name in wanted if name not in modules]:
        raise SelectionError(f"{type(model).__name__} has no submodule {missing[0]!r}; see model.named_modules().")
    return modules


def _refuse_fusing_(model: nn.Module) -> None:
    """Blocks that timm can fuse would compute the dense weights again, and forget the biases of Tucker modules."""
    for module in model.modules():
        fusing = [name for name in _FUSING if hasattr(type(module), name)]
        if fusing and any(isinstance(part, TuckerModule) for part in module.modules()):
            vars(module).update(dict.fromkeys(fusing, _fuse))


def _fuse(*_: object, **__: object) -> None:
    raise UnsupportedError(
        "a compressed block cannot be fused. Compress timm.utils.reparameterize_model(model) instead, or use "
        "batude_fx.fold(small), which folds the batch-norms."
    )


def _check(replaced: nn.Module, expected: Mapping[str, nn.Module]) -> None:
    found = dict(replaced.named_modules(remove_duplicate=False))
    for name, module in expected.items():
        if found.get(name) is not module:
            raise BatudeError(
                f"the copy of {type(replaced).__name__} does not hold the replacement at {name!r}: it lies inside "
                "another replaced module, or a parent has a __deepcopy__ that ignores its memo. Exclude that name."
            )
