"""What timm and torchvision know of their models: here, the input that a model takes."""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from batude_fx.errors import DiscoveryError
from batude_fx.graph.flops import count_params
from batude_fx.graph.provenance import attached

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

_SIDE = 224
_CLASSES = 1000  # of torchvision's classifiers
_DETECTION_SIDE = 320
_FLOW_SIDE = 128
_FRAMES = 16


def example_inputs(model: nn.Module) -> tuple[object, ...]:
    """Arguments of one run of a timm or torchvision model: one image, video or image pair of seeded noise.

    Args:
        model: Made by timm or torchvision; others need `example_inputs=` where they are used.

    Returns:
        The arguments, on the model's device and in its dtype.

    Raises:
        DiscoveryError: The model is of neither library.
    """
    package = type(model).__module__.partition(".")[0]
    if getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None):
        return (_noise(model, 1, *_timm_size(model)),)
    if package == "torchvision":
        return _torchvision_inputs(model)
    raise DiscoveryError(
        f"{type(model).__name__} is no timm or torchvision model, so its input is not known. "
        "Pass example_inputs=, for an image model torch.zeros(1, 3, 224, 224)."
    )


def resolve_inputs(model: nn.Module, given: Tensor | tuple[object, ...] | None) -> tuple[object, ...]:
    """The arguments of one run: what was given, a single tensor by itself too, or else what is known of the model.

    Raises:
        DiscoveryError: Nothing was given, and the model is of neither library.
    """
    if given is None:
        return example_inputs(model)
    given = (given,) if isinstance(given, Tensor) else tuple(given)
    copies: tuple[object, ...] = tree_map_only(Tensor, Tensor.clone, given)  # a model may work in place on what it gets
    return copies


def published_images(name: str) -> dict[str, Any]:
    """What images a classifier of torchvision was published for, in timm's words; empty for all other networks.

    Args:
        name: As torchvision registers it.

    Source: the transforms of its default weights.
    """
    from torchvision import models
    from torchvision.transforms._presets import ImageClassification

    entries = list(models.get_model_weights(name))
    shown = entries and models.get_model_weights(name).DEFAULT.transforms()
    if not isinstance(shown, ImageClassification):
        return {}
    (side,), (resized,) = shown.crop_size, shown.resize_size
    return {
        "input_size": (3, side, side), "crop_pct": side / resized, "interpolation": shown.interpolation.value,
        "mean": tuple(shown.mean), "std": tuple(shown.std),
    }  # fmt: skip


def _timm_size(model: nn.Module) -> tuple[int, ...]:
    config = cast("dict[str, Any]", getattr(model, "pretrained_cfg", None) or model.default_cfg)
    _, *size = config.get("input_size", (3, _SIDE, _SIDE))
    noted = getattr(model, "_model_args", {}).get("img_size")  # newer versions of timm note it
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None) or noted or size
    return (_input_channels(model), *((built_for, built_for) if isinstance(built_for, int) else built_for))


def _input_channels(model: nn.Module) -> int:
    """Channels of the first convolution, which a user may have changed."""
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)  # noqa: SLF001
    channels = getattr(model, "in_chans", None)
    return int(channels) if channels else 3 if first is None else first.in_channels


def _torchvision_inputs(model: nn.Module) -> tuple[object, ...]:
    family = type(model).__module__.removeprefix("torchvision.models.").partition(".")[0]
    if family == "detection":
        return ([_noise(model, 3, _DETECTION_SIDE, _DETECTION_SIDE)],)
    if family == "optical_flow":
        # RAFT's correlation pyramid halves an eighth of the image three times.
        return tuple(_noise(model, 1, 3, _FLOW_SIDE, _FLOW_SIDE) for _ in range(2))
    size = _crop_size(model)
    if family == "video":
        return (_noise(model, 1, 3, _FRAMES, *(size * 2)[:2]),)
    return (_noise(model, 1, _input_channels(model), *(size * 2)[:2]),)


def _crop_size(model: nn.Module) -> list[int]:
    """Crop of the weights that torchvision has for this very model, recognised by file and number of parameters."""
    weights = list(_weights_of_file(type(model).__module__))
    record = attached(model)  # of a compressed network, which has fewer
    count = record.dense_params if record else count_params(model)
    counts = {count, *(count + (_CLASSES - head.out_features) * (head.in_features + 1) for head in _head(model))}
    same = [entry for entry in weights if entry.meta.get("num_params") in counts]
    sizes = {tuple(_crop(entry)) for entry in same or weights}
    return list(sizes.pop()) if len(sizes) == 1 else [_SIDE]


def _head(model: nn.Module) -> list[nn.Linear]:
    """The last linear layer, which classifies, where there is one: it may be for other classes than the published."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]


def _weights_of_file(module: str) -> Iterator["WeightsEnum"]:
    from torchvision import models

    names = (name for name in models.list_models() if models.get_model_builder(name).__module__ == module)
    return chain.from_iterable(models.get_model_weights(name) for name in names)


def _crop(entry: "WeightsEnum") -> list[int]:
    return list(getattr(entry.transforms(), "crop_size", [_SIDE]))


def _noise(model: nn.Module, *shape: int) -> Tensor:
    like = next((p for p in chain(model.parameters(), model.buffers()) if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(like)
