"""Run, trace or hook a model without any effect on it: a private copy is used, which shares the parameters' values."""

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batude_fx.errors import BatudeError

ModelT = TypeVar("ModelT", bound=nn.Module)

exclusive = threading.RLock()
"""Held by whoever changes state of the whole process for a while: the warnings filters, flags of torch, what torch.fx
patches. Threads that only run their models do not need it."""
_states_to_restore: dict[torch.Generator, tuple[Tensor, int]] = {}  # with the number of blocks that share each
if hasattr(os, "register_at_fork"):  # a process that is forked has none of the threads that would release or restore
    os.register_at_fork(after_in_child=exclusive._at_fork_reinit)  # type: ignore[attr-defined]  # noqa: SLF001
    os.register_at_fork(after_in_child=_states_to_restore.clear)


@contextmanager
def private_copy(model: ModelT) -> Iterator[ModelT]:
    """Yield a copy of a model in eval mode, to run, trace and hook, and restore the random generators afterwards.

    The model itself is not touched, not even for a moment: other threads may use it, and whatever it keeps in
    attributes, lists or buffers when it runs is kept by the copy. The copy shares the memory of the parameters, which
    need no gradients in it.

    Args:
        model: Any module; `model.compile()` has no effect on the copy.

    Raises:
        BatudeError: When a part of the model cannot be copied.
    """
    copied = _copy_to_run(model)
    devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda}
    with random_states_kept(devices):
        yield copied


def without_graphs(copied: ModelT, model: nn.Module) -> ModelT:
    """Return a private copy again after a run with gradients, or a fresh one if it keeps activations for its next run.

    A second backward pass would go through the graph of the first one too, which is gone.
    """
    return cast("ModelT", _copy_to_run(model)) if _keeps_graphs(copied) else copied


def _keeps_graphs(model: nn.Module) -> bool:
    found = _FindsGraphs()
    with found:
        copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    return found.any


def _copy_to_run(model: ModelT) -> ModelT:
    copied = deep_copy(model, {id(parameter): _with_shared_values(parameter) for parameter in model.parameters()})
    copied.eval()
    return copied


@contextmanager
def random_states_kept(devices: Iterable[int]) -> Iterator[None]:
    """Restore torch's random generators, that of the CPU and those of some CUDA devices, when a block ends.

    Where blocks of several threads overlap, they share the state from before the first one, which the last one
    restores: each on its own would save what another one has drawn, and bring it back later. The lock is held for a
    moment, so that no state is saved that a holder of the lock will undo.
    """
    generators = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
    with exclusive:
        for generator in generators:
            state, users = _states_to_restore.get(generator, (generator.get_state(), 0))
            _states_to_restore[generator] = state, users + 1
    try:
        yield
    finally:
        with exclusive:
            for generator in generators:
                shared = _states_to_restore.pop(generator, None)
                if shared and shared[1] > 1:
                    _states_to_restore[generator] = shared[0], shared[1] - 1
                elif shared:  # a process that was forked in the block has no state to restore
                    generator.set_state(shared[0])


def deep_copy(model: ModelT, memo: dict[int, Any]) -> ModelT:
    """Return a deep copy of a model, with the `training` flags of its modules.

    Args:
        model: Any module. Tensors that it keeps with their graph, which `copy.deepcopy` refuses, are detached.
        memo: The memo of `copy.deepcopy`, `id` of an object to its copy; afterwards it has all copies.

    Raises:
        BatudeError: When a part of the model cannot be copied.
    """
    try:
        with _FindsGraphs():
            copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the model's parts raise
        raise BatudeError(
            f"{type(model).__name__} cannot be copied: {error}. Drop handles to files, locks, threads and processes, "
            "then try again."
        ) from error
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():  # graph modules are in training mode after a copy
        vars(module)["training"] = flags.get(name, module.training)
    return copied


class _FindsGraphs(TorchFunctionMode):
    """Copies tensors that are the result of a computation without their graph, and tells whether there were any."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        self.any = True
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


def _with_shared_values(parameter: Tensor) -> Tensor:
    """Return a parameter of the same class and with the same attributes, that needs no gradients."""
    shared: Tensor = nn.Parameter(parameter.detach(), requires_grad=False)
    if type(shared) is not type(parameter):
        shared = Tensor._make_subclass(type(parameter), parameter.detach(), False)  # noqa: SLF001
    vars(shared).update(vars(parameter) | vars(shared))
    return shared
