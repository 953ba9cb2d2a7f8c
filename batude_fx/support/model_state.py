"""Run, trace or hook the caller's model, and leave it in the state that it was in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only


def run_on_copies(model: nn.Module, inputs: tuple[object, ...]) -> Any:  # noqa: ANN401 - whatever the model returns
    """Return the output of a model for copies of the inputs, since a model may change its inputs in place."""
    return model(*tree_map_only(Tensor, Tensor.clone, inputs))


@contextmanager
def eval_and_restore(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a block, and restore its state when the block ends.

    Restored are the attributes, hooks and `training` flags of all modules, the values of buffers, and torch's global
    random generators, from which some models draw in their forward. Attributes include what a model stores while it
    runs or is traced, such as a cache or a proxy, and hooks include those that a tool leaves behind when it fails.
    Not restored are values of parameters and the contents of lists. Inside the block the model runs without the
    effect of `model.compile()`.

    Args:
        model: Any module.
    """
    # Parameters, buffers, children and hooks live in dicts that are attributes.
    attributes = [(vars(module), vars(module).copy()) for module in model.modules()]
    dicts = [(value, value.copy()) for _, before in attributes for value in before.values() if isinstance(value, dict)]
    buffers = [
        (buffer, buffer._version, buffer.clone())  # noqa: SLF001 - it tells of a write without comparing values
        for buffer in model.buffers()
        if not is_lazy(buffer) and not buffer.is_inference()
    ]
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            for module in model.modules():
                vars(module).pop("_compiled_call_impl", None)  # set by `model.compile()`
            model.eval()
            yield
    finally:
        for current, before in (*attributes, *dicts):
            current.clear()
            current.update(before)
        with torch.no_grad():
            for buffer, version, values in buffers:
                # A copy into an untouched buffer would break a backward pass that has saved it.
                if buffer._version != version:  # noqa: SLF001
                    buffer.copy_(values)
