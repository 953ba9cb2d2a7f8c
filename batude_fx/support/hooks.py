"""Forward and gradient hooks. No other file registers any, so this is where they are sure to be removed again."""

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

    def hook_before(key: KeyT) -> Callable[..., None]:
        def run(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if before is not None:
                before(key, args, kwargs)

        return run

    def hook_after(key: KeyT) -> Callable[..., object]:
        def run(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
            return None if after is None else after(key, args, kwargs, output)

        return run

    for key, module in modules.items():
        if before is not None:
            handles.append(module.register_forward_pre_hook(hook_before(key), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(hook_after(key), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_gradient(tensor: Tensor, receive: Callable[[Tensor], None]) -> None:
    """Call a function with the gradient of a tensor when a backward pass reaches it."""
    tensor.register_hook(receive)  # type: ignore[no-untyped-call]
