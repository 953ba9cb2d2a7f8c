"""The arguments of one run of a model, positional ones and keywords, as `torch.export` takes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Inputs:
    """The arguments of one run of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: object) -> "Inputs":
        """Read what a user gave: one of `ExampleInputs`.

        Raises:
            TypeError: When it is none of these; the message says which one may have been meant.
        """
        if isinstance(given, Inputs):
            return given
        if isinstance(given, Tensor):
            return cls((given,))
        if isinstance(given, tuple):
            return cls(given)
        if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
            return cls(kwargs=dict(given))
        hint = ""
        if isinstance(given, list):
            hint = " A model that takes one list gets (images,), one that takes several tensors tuple(images)."
        elif isinstance(given, Mapping):
            key = next(name for name in given if not isinstance(name, str))
            hint = f" Its key {key!r} is not the name of an argument; the tensor alone may be given, too."
        elif hasattr(given, "__array__"):
            hint = " Pass torch.as_tensor(array)."
        raise TypeError(
            f"it is of type {type(given).__name__}, not a tensor, a tuple of positional arguments, or a dict of "
            f"keyword arguments.{hint}"
        )

    def run(self, model: nn.Module) -> Any:  # noqa: ANN401 - whatever the model returns
        """Return the output of a model."""
        return model(*self.args, **self.kwargs)

    def leaves(self) -> list[object]:
        """Return all values in the arguments, at any depth of lists, tuples and dicts."""
        leaves: list[object] = tree_leaves((self.args, dict(self.kwargs)))
        return leaves

    def tensors(self) -> list[Tensor]:
        """Return all tensors in the arguments, at any depth of lists, tuples and dicts."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], object]) -> Self:
        """Return the arguments with the results of a function in place of their tensors."""
        args, kwargs = tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return type(self)(args, kwargs)

    def copies(self) -> Self:
        """Return the arguments with copies of their tensors, since a model may change its inputs in place."""
        return self.map(Tensor.clone)

    @property
    def only_tensor(self) -> Tensor | None:
        """The tensor, if it is the only argument; else None."""
        first = next(iter((*self.args, *self.kwargs.values())), None)
        return first if isinstance(first, Tensor) and len(self.args) + len(self.kwargs) == 1 else None

    def with_tensor(self, tensor: Tensor) -> Self:
        """Return the arguments with another tensor in place of the only one."""
        return self.map(lambda _: tensor)

    @property
    def image(self) -> Tensor | None:
        """The batch of images (N, C, H, W), if that is the only argument; else None."""
        tensor = self.only_tensor
        return tensor if tensor is not None and tensor.ndim == 4 else None  # noqa: PLR2004 - (N, C, H, W)


ExampleInputs = Tensor | tuple[object, ...] | Mapping[str, object] | Inputs
"""What users give: one tensor, a tuple of positional arguments, or a dict of keyword arguments."""
