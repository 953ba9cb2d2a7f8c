"""Borrow the caller's model politely: run it, trace it, hang hooks on it, and give it back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode; at the end its modules have the attributes, hooks and `training` flags of before.

    Models keep things for later in attributes: a proxy while they are traced, a cache when they run. These are undone,
    and so are hooks that a failing tool leaves behind. Values written into a tensor are not.

    Args:
        model: Any module.
    """
    # Parameters, buffers, children and hooks live in dicts that are attributes.
    attributes = [(vars(module), vars(module).copy()) for module in model.modules()]
    contents = [(item, item.copy()) for _, before in attributes for item in before.values() if isinstance(item, dict)]
    try:
        model.eval()
        yield
    finally:
        for current, before in (*attributes, *contents):
            current.clear()
            current.update(before)
