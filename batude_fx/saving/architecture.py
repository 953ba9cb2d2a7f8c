"""Architectures of timm and torchvision, by the names that these libraries register, and models built by name."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from batude_fx.errors import SavedModelError, first_line
from batude_fx.support.model_state import exclusive

ENTRYPOINT = "batude_fx"
"""The name under which this package itself is registered with timm and torchvision."""
Library = Literal["timm", "torchvision"]
ArgumentValue = bool | int | float | str | tuple[int, int] | None


@dataclass(frozen=True)
class Architecture:
    """A registered architecture of timm or torchvision, and the arguments that it is built with.

    Attributes:
        library: The library that registers it.
        base: Its name in that library.
        args: Arguments of the library's model factory.
    """

    library: Library
    base: str
    args: Mapping[str, ArgumentValue]

    def build(self, *, weightless: bool = False, **overrides: Any) -> nn.Module:  # noqa: ANN401 - what timm was given
        """Build a model without pretrained weights.

        Args:
            weightless: Put parameters and buffers on the meta device. A model whose constructor fails there is built
                in memory as usual.
            **overrides: Arguments that take precedence over `args`.

        Raises:
            SavedModelError: When the name is not registered, or does not take the arguments.
        """
        args = {**self.args, **overrides}
        factory = _factory(self.library, self.base)
        with exclusive, warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")  # they are about initial values, which loaded weights replace
            if weightless:
                with suppress(Exception), _OnMetaDevice():  # constructors that read values fail there in many ways
                    return factory(**args)
            try:
                return factory(**args)
            except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
                raise SavedModelError(
                    f"{self.library} cannot build {self.base!r} with {args}: {first_line(error)}."
                ) from error


def is_registered(library: Library, base: str) -> bool:
    """Return whether a library registers an architecture under exactly this name; saved folders do not count."""
    from torchvision import models

    if base == ENTRYPOINT or not base.isidentifier():
        return False
    return timm.is_model(base) if library == "timm" else base in models.list_models()


def _factory(library: Library, base: str) -> Callable[..., nn.Module]:
    """Return the function that builds an architecture without pretrained weights."""
    from torchvision import models

    if not is_registered(library, base):
        raise SavedModelError(f"{base!r} is no architecture that {library} registers; use load(folder, model=fresh).")
    if library == "timm":
        return lambda **args: timm.create_model(base, pretrained=False, **args)
    builder = models.get_model_builder(base)
    # The default of weights_backbone would download weights.
    weight_names = {"weights", "weights_backbone"} & inspect.signature(builder).parameters.keys()
    return lambda **args: cast("nn.Module", builder(**dict.fromkeys(weight_names), **args))


class _OnMetaDevice(TorchFunctionMode):
    """Allocate the tensors of layers on the meta device; tensors that constructors compute with keep their values."""

    _ALLOCATING = frozenset({torch.empty, torch.zeros, torch.ones})

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func in self._ALLOCATING:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
