"""Find the registered architecture that a compressed model was built from, so that its name can be saved.

A model does not always tell its name, and its layers may have been changed since it was built. Each candidate is
therefore tested: it is accepted only if, with the ranks and the saved weights, its outputs are bit-identical.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import SavedModelError
from batude_fx.graph.example_inputs import example_inputs, timm_config
from batude_fx.saving.architecture import Architecture, ArgumentValue, is_registered
from batude_fx.saving.config import FactoryArgs, SavedArchitecture
from batude_fx.saving.weights import has_channels_last, load_weights_, read_weights, to_channels_last_
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import exclusive, private_copy
from batude_fx.tucker.modules import TuckerModule


@dataclass(frozen=True)
class ExampleRun:
    """A forward pass of a model on its example input.

    Attributes:
        inputs: Arguments of the pass; None where the model has no example input, or does not run on it.
        outputs: All tensors and other values that the pass returned; empty where there was none.
    """

    inputs: Inputs | None
    outputs: list[object]

    @classmethod
    def of(cls, model: nn.Module) -> "ExampleRun":
        """Run a model of timm or torchvision on its example input."""
        try:
            inputs = example_inputs(model)
            return cls(inputs, _outputs(model, inputs))
        except Exception:  # noqa: BLE001 - models fail in many ways on inputs that they do not take
            return cls(None, [])

    @property
    def channels(self) -> int | None:
        """The channels of the input, where it is one tensor."""
        image = self.inputs.only_tensor if self.inputs else None
        return None if image is None else image.shape[1]

    @property
    def classes(self) -> int | None:
        """The size of axis 1 of the first output: the classes of a classifier."""
        first = self.outputs[0] if self.outputs else None
        return first.shape[1] if isinstance(first, Tensor) and first.ndim > 1 else None


def find_architecture(model: nn.Module, weights: Path, run: ExampleRun) -> SavedArchitecture:
    """Return the first candidate that rebuilds a model, or an architecture without a name if none does.

    Args:
        model: The compressed model.
        weights: Its weights, as they were saved.
        run: A forward pass of the model.
    """
    sites = {name: module for name, module in model.named_modules() if isinstance(module, TuckerModule)}
    unnamed = SavedArchitecture(
        library=None,
        base=None,
        ranks={name: (site.ranks.rank_out, site.ranks.rank_in) for name, site in sites.items()},
        biased=tuple(name for name, site in sites.items() if site.bias is not None),
    )
    if not run.outputs:
        return unnamed
    for candidate in candidate_architectures(model, run.channels, run.classes):
        try:
            named = SavedArchitecture.model_validate({**unnamed.model_dump(), **asdict(candidate)})
        except ValidationError:  # an argument is an object, which a config cannot hold
            continue
        if rebuilds(named, model, weights, run.outputs):
            return named
    return unnamed


def rebuilds(candidate: SavedArchitecture, model: nn.Module, weights: Path, outputs: list[object]) -> bool:
    """Return whether an architecture with the saved weights is the model: the same class, tensors and outputs."""
    if not _has_same_structure(candidate, model):
        return False
    try:
        rebuilt = candidate.build()
        load_weights_(rebuilt, read_weights(weights))
    except SavedModelError:
        return False
    if has_channels_last(model):
        to_channels_last_(rebuilt)
    rebuilt.to(next(model.parameters()).device)
    try:
        rebuilt_outputs = _outputs(rebuilt, example_inputs(model))
    except Exception:  # noqa: BLE001 - a model that was built in another way may fail in any way
        return False
    return len(rebuilt_outputs) == len(outputs) and all(map(_equal, rebuilt_outputs, outputs))


def candidate_architectures(model: nn.Module, channels: int | None, classes: int | None) -> Iterator[Architecture]:
    """Yield the architectures that a model may have been built from, the likeliest first.

    Args:
        model: A model of timm or torchvision; there are no candidates for others.
        channels: Channels of the input, where known.
        classes: Classes of the output, where known.
    """
    if is_registered("timm", base := str(timm_config(model).get("architecture"))):
        yield from _timm_candidates(model, base, channels)
    if type(model).__module__.startswith("torchvision."):
        yield from _torchvision_candidates(model, classes)


def _timm_candidates(model: nn.Module, base: str, channels: int | None) -> Iterator[Architecture]:
    # Newer versions of timm record the arguments of the factory; with all versions, some can be read off the model.
    factory_args: dict[str, Any] = getattr(model, "_model_args", {})
    recorded = {name: value for name, value in factory_args.items() if name in FactoryArgs.__annotations__}
    default = Architecture("timm", base, recorded)
    try:
        fresh = default.build(weightless=True)
    except SavedModelError:
        return
    changed = {}
    for name, read in _TIMM_ARGUMENTS.items():
        value = read(model)
        if value is not None and value != read(fresh):
            changed[name] = value
    if channels not in {None, 3}:
        changed["in_chans"] = channels
    if changed:
        yield Architecture("timm", base, {**recorded, **changed})
    yield default


def _torchvision_candidates(model: nn.Module, classes: int | None) -> Iterator[Architecture]:
    from torchvision import models

    args: dict[str, ArgumentValue] = {
        name: getattr(model, name) for name in ("aux_logits", "transform_input") if hasattr(model, name)
    }
    if hasattr(model, "aux_classifier"):
        args["aux_loss"] = model.aux_classifier is not None
    for name in models.list_models():
        # A builder's file may only import the class: SSDLite's imports SSD.
        file = sys.modules[models.get_model_builder(name).__module__]
        if getattr(file, type(model).__name__, None) is type(model):
            yield Architecture("torchvision", name, args)
            if classes is not None:
                yield Architecture("torchvision", name, {**args, "num_classes": classes})


def _pool_type(model: nn.Module) -> str | None:
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    kind = getattr(pool, "pool_type", pool)
    return kind if isinstance(kind, str) else None


# Arguments of timm's factory that can be read off a model.
_TIMM_ARGUMENTS: dict[str, Callable[[nn.Module], Any]] = {
    "num_classes": lambda model: getattr(model, "num_classes", None),
    "drop_rate": lambda model: getattr(model, "drop_rate", None),
    "global_pool": _pool_type,
    "img_size": lambda model: getattr(getattr(model, "patch_embed", None), "img_size", None),
}


def _has_same_structure(candidate: SavedArchitecture, model: nn.Module) -> bool:
    """Compare classes and shapes on the meta device, which is quick and takes no memory."""
    try:
        sketch = candidate.build(weightless=True)
    except SavedModelError:
        return False
    return type(sketch) is type(model) and _structure(sketch) == _structure(model)


def _structure(model: nn.Module) -> tuple[dict[str, torch.Size], dict[str, type[nn.Module]]]:
    # If a branch is still multiplied by zero, a wrong activation in it does not change the outputs.
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return shapes, {name: _layer_class(module) for name, module in model.named_modules()}


def _layer_class(module: nn.Module) -> type[nn.Module]:
    # The two differ only while several processes train.
    return nn.BatchNorm2d if isinstance(module, nn.SyncBatchNorm) else type(module)


def _outputs(model: nn.Module, inputs: Inputs) -> list[object]:
    # Without benchmarking, cuDNN chooses the same algorithm every time.
    flags = torch.backends.cudnn.flags(benchmark=False, deterministic=True)
    with private_copy(model) as copied, torch.no_grad(), exclusive, flags:
        return list(tree_leaves(inputs.run(copied)))


def _equal(a: object, b: object) -> bool:
    """Return whether two outputs are equal; NaN equals NaN."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124
