"""Example inputs for models of timm and torchvision, from what these libraries say about their models."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batude_fx.errors import DiscoveryError
from batude_fx.graph.flops import count_params
from batude_fx.graph.provenance import attached_record
from batude_fx.support.inputs import ExampleInputs, Inputs

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

_SIDE = 224
_CLASSES = 1000  # number of classes of torchvision's classifiers
_DETECTION_SIDE = 320
_FLOW_SIDE = 128
_FRAMES = 16


def example_inputs(model: nn.Module) -> Inputs:
    """Return arguments to run a timm or torchvision model with: an image, video or image pair of seeded noise.

    Args:
        model: A model of timm or torchvision.

    Returns:
        The arguments, on the model's device and in its dtype.

    Raises:
        DiscoveryError: The model is from neither library.
    """
    package = type(model).__module__.partition(".")[0]
    if timm_config(model):
        return image_of_size(model, _timm_size(model))
    if package == "torchvision":
        return Inputs(_torchvision_inputs(model))
    raise DiscoveryError(
        f"{type(model).__name__} is no timm or torchvision model, so its input is not known. "
        "Pass example_inputs=, for an image model torch.zeros(1, 3, 224, 224)."
    )


def resolve_inputs(model: nn.Module, given: ExampleInputs | None) -> Inputs:
    """Return copies of a user's example inputs, or by default the inputs for the model.

    Args:
        model: Any module.
        given: A tensor, a tuple of positional arguments, or a dict of keyword arguments; None for the default of
            `example_inputs`.

    Raises:
        DiscoveryError: `given` is none of these; or it is None, and the model is from neither timm nor torchvision.
    """
    if given is None:
        return example_inputs(model)
    try:
        return Inputs.parse(given).copies()
    except TypeError as error:
        raise DiscoveryError(f"example_inputs cannot be passed to {type(model).__name__}: {error}") from None


def image_of_size(model: nn.Module, size: Sequence[int]) -> Inputs:
    """Return an image (1, C, H, W) of seeded noise as the arguments of a model, on its device and in its dtype.

    Args:
        model: Any module.
        size: C, H and W.
    """
    return Inputs((_noise(model, 1, *size),))


def remember_input_size_(model: nn.Module, inputs: Inputs) -> None:
    """Write the size of the images that a network is used on into the config that timm keeps in its models.

    Whoever saves, loads, evaluates or exports the network finds it there. Nothing is written if the inputs are no
    images (N, C, H, W), if the network is from neither timm nor torchvision, or if its images have this size anyway.
    """
    try:
        example = example_inputs(model)
    except DiscoveryError:
        return
    known, size = _image_size(example), _image_size(inputs)
    if known is not None and size is not None and known != size:
        config = {**timm_config(model), "input_size": size}
        vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config


def timm_config(model: nn.Module) -> Mapping[str, Any]:
    """Return what timm knows of a model, its `pretrained_cfg`; empty for models that have none.

    Models from elsewhere may have attributes of the same names that hold anything, and may raise when asked for them.
    """
    for name in ("pretrained_cfg", "default_cfg"):
        with suppress(Exception):
            config = getattr(model, name)
            if isinstance(config, Mapping) and ("input_size" in config or "architecture" in config):
                return config
    return {}


def _image_size(inputs: Inputs) -> tuple[int, ...] | None:
    """Return (C, H, W) of inputs that are a batch of images, else None."""
    return None if inputs.image is None else tuple(inputs.image.shape[1:])


def published_images(name: str) -> dict[str, Any]:
    """Return the preprocessing that a torchvision classifier was published with, under the keys of timm's configs.

    Args:
        name: Name in torchvision's model registry.

    Returns:
        Input size, crop, interpolation, mean and standard deviation; empty for networks that are no classifiers.

    Source: the transforms of torchvision's default weights.
    """
    from torchvision import models
    from torchvision.transforms._presets import ImageClassification

    entries = list(models.get_model_weights(name))
    preset = entries and models.get_model_weights(name).DEFAULT.transforms()
    if not isinstance(preset, ImageClassification):
        return {}
    (side,), (resized_side,) = preset.crop_size, preset.resize_size
    return {
        "input_size": (3, side, side), "crop_pct": side / resized_side, "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean), "std": tuple(preset.std),
    }  # fmt: skip


def _timm_size(model: nn.Module) -> tuple[int, ...]:
    """Return the image size (C, H, W) that a timm model was built for, which may differ from its pretrained config."""
    _, *default_size = timm_config(model).get("input_size", (3, _SIDE, _SIDE))
    if getattr(getattr(model, "patch_embed", None), "strict_img_size", True) is False:  # it takes other sizes as well
        return (_input_channels(model), *default_size)
    argument = getattr(model, "_model_args", {}).get("img_size")  # newer versions of timm keep the arguments
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or argument or default_size
    return (_input_channels(model), *((size, size) if isinstance(size, int) else size))


def _input_channels(model: nn.Module) -> int:
    """Return the input channels of the model, which a user may have changed from 3."""
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)  # noqa: SLF001
    channels = getattr(model, "in_chans", None)
    return channels if isinstance(channels, int) and channels else 3 if first is None else first.in_channels


def _torchvision_inputs(model: nn.Module) -> tuple[object, ...]:
    family = type(model).__module__.removeprefix("torchvision.models.").partition(".")[0]
    if family == "detection":
        return ([_noise(model, 3, _DETECTION_SIDE, _DETECTION_SIDE)],)
    if family == "optical_flow":
        # RAFT works on features of an eighth of the image's side, which its correlation pyramid halves three times.
        return tuple(_noise(model, 1, 3, _FLOW_SIDE, _FLOW_SIDE) for _ in range(2))
    size = _crop_size(model)
    if family == "video":
        return (_noise(model, 1, 3, _FRAMES, *(size * 2)[:2]),)
    return (_noise(model, 1, _input_channels(model), *(size * 2)[:2]),)


def _crop_size(model: nn.Module) -> list[int]:
    """Return the crop size of torchvision's weights for this model.

    A model does not say which of torchvision's architectures it is, so that its weights are found by the file that
    defines its class and by its number of parameters, with its own head or with one for 1000 classes.
    """
    weights = list(_weights_of_file(type(model).__module__))
    record = attached_record(model)  # a compressed network has fewer parameters than its original
    count = record.dense_params if record else count_params(model)
    counts = {count, *(count + (_CLASSES - head.out_features) * (head.in_features + 1) for head in _head(model))}
    matches = [entry for entry in weights if entry.meta.get("num_params") in counts]
    sizes = {tuple(_crop(entry)) for entry in matches or weights}
    return list(sizes.pop()) if len(sizes) == 1 else [_SIDE]


def _head(model: nn.Module) -> list[nn.Linear]:
    """Return the last linear layer in a list, or an empty list: a user may have changed its number of classes."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]


def _weights_of_file(module: str) -> Iterator["WeightsEnum"]:
    """Iterate over the weights of all torchvision models that are defined in one Python module."""
    from torchvision import models

    names = (name for name in models.list_models() if models.get_model_builder(name).__module__ == module)
    return chain.from_iterable(models.get_model_weights(name) for name in names)


def _crop(entry: "WeightsEnum") -> list[int]:
    return list(getattr(entry.transforms(), "crop_size", [_SIDE]))


def _noise(model: nn.Module, *shape: int) -> Tensor:
    """Draw seeded Gaussian noise, on the device and in the dtype of the model."""
    like = next((p for p in chain(model.parameters(), model.buffers()) if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(like)
