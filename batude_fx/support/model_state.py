"""Run, trace or hook the caller's model, and leave it in the state that it was in."""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only


class _Exclusive(ContextDecorator):
    """A lock that one thread at a time holds, for a block or for a whole function, as often as it asks for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


exclusive = _Exclusive()
"""Held by whoever changes a model for a while, reads one that another thread may be changing, or uses state of the
whole process: torch's random generators, the warnings filters, what torch.fx patches. Threads that only run their
models do not need it."""

_MOST_CONTAINERS = 100_000  # a model may hold the whole program, as a Lightning module holds its trainer
_WITHOUT_STATE = (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, threading.Thread)


def run_on_copies(model: nn.Module, inputs: tuple[object, ...]) -> Any:  # noqa: ANN401 - whatever the model returns
    """Return the output of a model for copies of the inputs, since a model may change its inputs in place."""
    return model(*tree_map_only(Tensor, Tensor.clone, inputs))


@contextmanager
def eval_and_restore(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a block, and restore its state when the block ends.

    Restored are the attributes, hooks and `training` flags of all modules, the contents of the lists, dicts, sets and
    plain objects among the attributes, the values of buffers, and torch's global random generators, from which some
    models draw in their forward. Attributes include what a model stores while it runs or is traced, such as a cache or
    a proxy, and hooks include those that a tool leaves behind when it fails. Not restored are the values of parameters
    and of other tensors. Inside the block the model runs without the effect of `model.compile()`.

    One thread at a time is inside. Other threads may run the model meanwhile, in eval mode: nothing that they need is
    taken away, not even for a moment.

    Args:
        model: Any module.
    """
    with exclusive, ExitStack() as restored:  # which goes on after an error
        for container, content in _containers(model):
            restored.callback(_restore_container, container, content)
        for buffer in model.buffers():
            if not is_lazy(buffer) and not buffer.is_inference():
                restored.callback(_restore_buffer, buffer, buffer._version, buffer.clone())  # noqa: SLF001
        devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda}
        restored.enter_context(torch.random.fork_rng(devices))
        for module in model.modules():
            vars(module).pop("_compiled_call_impl", None)  # set by `model.compile()`
        model.eval()
        yield


def _containers(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield the containers that a model keeps things in, each with a copy of its content.

    These are the attributes of its modules, which include the dicts of their parameters, buffers, children and hooks;
    and the dicts, lists, deques, sets and attributes of plain objects that can be reached from there, as many as
    `_MOST_CONTAINERS`.
    """
    queue: deque[Any] = deque(vars(module) for module in model.modules())
    of_modules = len(queue)
    visited: set[int] = set()
    while queue and len(visited) < _MOST_CONTAINERS + of_modules:
        item = queue.popleft()
        if isinstance(item, tuple):
            queue += item
        elif isinstance(item, dict | list | deque | set):
            if id(item) not in visited:
                visited.add(id(item))
                content: Any = dict(dict.items(item)) if isinstance(item, dict) else list(item)
                queue += content.values() if isinstance(item, dict) else content
                yield item, content
        elif isinstance(getattr(item, "__dict__", None), dict) and not isinstance(item, _WITHOUT_STATE):
            queue.append(vars(item))


def _restore_container(container: Any, content: Any) -> None:  # noqa: ANN401 - a dict, or a list, deque or set
    """Give a container its content again, by as few changes as possible: other threads may be reading it.

    The methods of the built-in types are used, as subclasses may refuse to be changed.
    """
    if isinstance(container, dict):
        _restore_dict(container, content)
    elif isinstance(container, set):
        if {id(item) for item in container} != {id(item) for item in content}:
            set.clear(container)
            set.update(container, content)
    elif len(container) != len(content) or any(new is not old for new, old in zip(container, content, strict=True)):
        if isinstance(container, list):
            list.__setitem__(container, slice(None), content)
        else:
            deque.clear(container)
            deque.extend(container, content)


def _restore_dict(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    base = OrderedDict if isinstance(container, OrderedDict) else dict
    for key in [key for key in dict.keys(container) if key not in content]:
        base.__delitem__(container, key)
    for key, value in content.items():
        if dict.get(container, key, content) is not value:  # the content itself is no value of it
            base.__setitem__(container, key, value)
    if list(dict.keys(container)) != list(content):  # a key that was missing meanwhile stands last now
        for key, value in content.items():
            base.__delitem__(container, key)
            base.__setitem__(container, key, value)


@torch.no_grad()
def _restore_buffer(buffer: Tensor, version: int, values: Tensor) -> None:
    """Give a buffer its values again, where it was written to: the version tells that without comparing values.

    A copy into an untouched buffer would break a backward pass that has saved it.
    """
    if buffer._version != version:  # noqa: SLF001
        buffer.copy_(values)
