"""Borrow the caller's model politely: run it, trace it, hang hooks on it, and give it back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only


def run_on_copies(model: nn.Module, inputs: tuple[object, ...]) -> Any:  # noqa: ANN401 - whatever the model gives
    """What a model gives for some arguments, which stay as they are: it may work on them in place."""
    return model(*tree_map_only(Tensor, Tensor.clone, inputs))


@contextmanager
def eval_and_restore(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode; at the end its modules have the attributes, hooks and `training` flags of before.

    torch's global random generators, which some models draw from in their forward, are where they were as well. What
    `model.compile()` made is not used meanwhile.

    Models keep things for later in attributes: a proxy while they are traced, a cache when they run. These are undone,
    and so are hooks that a failing tool leaves behind. Buffers get back their values; parameters that are written to,
    and lists that grow, stay as they are then.

    Args:
        model: Any module.
    """
    # Parameters, buffers, children and hooks live in dicts that are attributes.
    attributes = [(vars(module), vars(module).copy()) for module in model.modules()]
    contents = [(item, item.copy()) for _, before in attributes for item in before.values() if isinstance(item, dict)]
    buffers = [
        (buffer, buffer._version, buffer.clone())  # noqa: SLF001 - the only sign of a write that costs no comparison
        for buffer in model.buffers()
        if not is_lazy(buffer) and not buffer.is_inference()
    ]
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            for module in model.modules():
                vars(module).pop("_compiled_call_impl", None)  # of `model.compile()`
            model.eval()
            yield
    finally:
        for current, before in (*attributes, *contents):
            current.clear()
            current.update(before)
        with torch.no_grad():
            for buffer, version, values in buffers:
                # A copy into an untouched buffer would break a backward pass that has saved it.
                if buffer._version != version:  # noqa: SLF001
                    buffer.copy_(values)
