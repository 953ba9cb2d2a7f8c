"""Which architecture of timm or torchvision a model is, and how that one is built again: by registered names only."""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from batude_fx.errors import SavedModelError, first_line

ENTRYPOINT = "batude_fx"
Library = Literal["timm", "torchvision"]
# Arguments of a factory can name files to read, or classes; these cannot.
Argument = Literal[
    "num_classes", "in_chans", "global_pool", "img_size", "output_stride", "drop_rate", "drop_path_rate", "act_layer",
    "norm_layer", "aux_logits", "aux_loss", "transform_input",
]  # fmt: skip
Value = bool | int | float | str | tuple[int, int] | None


@dataclass(frozen=True)
class Architecture:
    """One call of timm's or torchvision's model factory.

    Attributes:
        library: Where the architecture is registered.
        base: Its name there.
        args: Its arguments.
    """

    library: Library
    base: str
    args: Mapping[str, Value]

    def build(self, *, weightless: bool = False, **overrides: Any) -> nn.Module:  # noqa: ANN401 - what timm was given
        """A fresh model, without pretrained weights.

        Args:
            weightless: Leave parameters and buffers on the meta device; what cannot be built so is built as usual.
            **overrides: Arguments that take precedence over `args`.

        Raises:
            SavedModelError: When the name is not registered, or does not take the arguments.
        """
        args = {**self.args, **overrides}
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")  # about initial values, which are about to be replaced
            if weightless:
                try:
                    return self._call(args, weightless=True)
                except Exception:  # noqa: BLE001, S110 - constructors that compute with values fail in many ways
                    pass
            try:
                return self._call(args)
            except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
                raise SavedModelError(
                    f"{self.library} cannot build {self.base!r} with {args}: {first_line(error)}."
                ) from error

    def _call(self, args: Mapping[str, Any], *, weightless: bool = False) -> nn.Module:
        builder = _builder(self.library, self.base)
        with _Weightless() if weightless else nullcontext():
            return builder(**args)


def is_registered(library: Library, base: str) -> bool:
    """Whether a library can build an architecture by this very name; saved folders do not count."""
    from torchvision import models

    if base == ENTRYPOINT or not base.isidentifier():
        return False
    return timm.is_model(base) if library == "timm" else base in models.list_models()


def candidate_architectures(model: nn.Module, channels: int | None, classes: int | None) -> Iterator[Architecture]:
    """What a model may have been built by, the likeliest first.

    Args:
        model: Of timm or torchvision; others give nothing.
        channels: Of the input, where known.
        classes: Of the output, where known.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if is_registered("timm", base := str(config.get("architecture"))):
        yield from _of_timm(model, base, channels)
    if type(model).__module__.startswith("torchvision."):
        yield from _of_torchvision(model, classes)


def _of_timm(model: nn.Module, base: str, channels: int | None) -> Iterator[Architecture]:
    # What the factory was called with: newer versions of timm note it, and all leave traces in the model.
    noted = {key: value for key, value in getattr(model, "_model_args", {}).items() if key in get_args(Argument)}
    default = Architecture("timm", base, noted)
    try:
        fresh = default.build(weightless=True)
    except SavedModelError:
        return
    seen = {name: (read(model), read(fresh)) for name, read in _TRACES.items()}
    changed = {name: value for name, (value, usual) in seen.items() if value != usual and value is not None}
    if channels not in {None, 3}:
        changed["in_chans"] = channels
    if changed:
        yield Architecture("timm", base, {**noted, **changed})
    yield default


def _of_torchvision(model: nn.Module, classes: int | None) -> Iterator[Architecture]:
    from torchvision import models

    args: dict[str, Value] = {name: getattr(model, name) for name in _TORCHVISION_FLAGS if hasattr(model, name)}
    if hasattr(model, "aux_classifier"):
        args["aux_loss"] = model.aux_classifier is not None
    for name in models.list_models():
        if _knows(models.get_model_builder(name).__module__, type(model)):
            yield Architecture("torchvision", name, args)
            if classes is not None:
                yield Architecture("torchvision", name, {**args, "num_classes": classes})


def _knows(module: str, model: type[nn.Module]) -> bool:
    """Whether a module of torchvision has the class; SSDLite, for one, is an SSD built in another file."""
    return getattr(sys.modules[module], model.__name__, None) is model


_TORCHVISION_FLAGS = ("aux_logits", "transform_input")


def _pooling(model: nn.Module) -> str | None:
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    kind = getattr(pool, "pool_type", pool)
    return kind if isinstance(kind, str) else None


def _built_for(model: nn.Module) -> tuple[int, int] | None:
    return getattr(getattr(model, "patch_embed", None), "img_size", None)


# Arguments that can be read off a model of timm.
_TRACES: dict[str, Callable[[nn.Module], Any]] = {
    "num_classes": lambda model: getattr(model, "num_classes", None),
    "drop_rate": lambda model: getattr(model, "drop_rate", None),
    "global_pool": _pooling,
    "img_size": _built_for,
}


def _builder(library: Library, base: str) -> Callable[..., nn.Module]:
    from torchvision import models

    if not is_registered(library, base):
        raise SavedModelError(f"{base!r} is no architecture that {library} registers; use load(folder, model=fresh).")
    if library == "timm":
        return lambda **args: timm.create_model(base, pretrained=False, **args)
    builder = models.get_model_builder(base)
    # A backbone's weights would be fetched by default.
    none = {name: None for name in ("weights", "weights_backbone") if name in inspect.signature(builder).parameters}
    return lambda **args: cast("nn.Module", builder(**none, **args))


class _Weightless(TorchFunctionMode):
    """Puts what layers allocate on the meta device, and leaves tensors that constructors compute with alone."""

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
