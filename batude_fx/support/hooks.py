"""Forward hooks, which are removed when a block ends, and gradient hooks, which live as long as their tensor.

No other file registers hooks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

KeyT = TypeVar("KeyT")


@contextmanager
def observe_calls(
    modules: Mapping[KeyT, nn.Module],
    *,
    before: Callable[[KeyT, tuple[Any, ...], dict[str, Any]], None] | None = None,
    after: Callable[[KeyT, tuple[Any, ...], dict[str, Any], Any], object] | None = None,
) -> Iterator[None]:
    """Call functions before and after every forward pass of some modules; remove their hooks when the block ends.

    Args:
        modules: Key to module; the functions receive the key in place of the module.
        before: Called as `before(key, args, kwargs)` with the arguments of the forward pass.
        after: Called as `after(key, args, kwargs, output)`. What it returns takes the place of the output, unless it
            returns None.
    """
    handles = []
    try:
        for key, module in modules.items():
            if before is not None:
                handles.append(module.register_forward_pre_hook(_with_key(before, key), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(_with_key(after, key), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_key(function: Callable[..., Any], key: object) -> Callable[..., Any]:
    """Return a hook that calls a function with the key in place of the module."""

    def hook(_module: nn.Module, *arguments: object) -> Any:  # noqa: ANN401 - what the function returns
        return function(key, *arguments)

    return hook


def on_gradient(tensor: Tensor, receive: Callable[[Tensor], None]) -> None:
    """Call a function with the gradient of a tensor when a backward pass reaches it."""
    tensor.register_hook(receive)  # type: ignore[no-untyped-call]
