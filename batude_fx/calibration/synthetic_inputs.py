"""Synthetic inputs of the structure that a model takes, for calibration without images of the user."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from batude_fx.calibration.dead_leaves import dead_leaves
from batude_fx.calibration.images import BATCH
from batude_fx.support.inputs import Inputs

SYNTHETIC_IMAGES = 96
SYNTHETIC_CLIPS = 16
SYNTHETIC_DRAWS = 2  # random combinations of the outputs per synthetic image, as there are few images
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def synthetic_batches(model: nn.Module, inputs: Inputs, *, seed: int = 0, batches: int | None = None) -> list[Inputs]:
    """Return synthetic inputs for a model, of the structure of its example input.

    A tensor of images (1, 1 or 3 channels, H, W) becomes dead leaves, one of clips (1, 1 or 3 channels, frames, H, W) a
    view that pans over dead leaves, any other floating-point tensor Gaussian noise; integers stay as they are.

    Args:
        model: Gives the mean and standard deviation that the images are normalized by, if it is a timm model; for
            others they are those of ImageNet.
        inputs: The example input.
        seed: Seed of the images.
        batches: Number of batches of 8 images, or of inputs of the size of the example; by default as many as suffice
            for calibration.

    Returns:
        Batches of a model that takes one tensor; for any other, inputs of the size of the example.
    """
    example = inputs.only_tensor
    if example is not None and example.is_floating_point():
        count = SYNTHETIC_CLIPS if example.ndim > 4 else SYNTHETIC_IMAGES  # noqa: PLR2004 - (N, C, frames, H, W)
        count = count if batches is None else BATCH * batches
        images = _synthetic_tensor(model, count, example.shape[1:], seed).to(example)
        return [inputs.with_tensor(batch) for batch in torch.split(images, BATCH)]

    def synthetic_inputs(seed: int) -> Inputs:
        def synthesize(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return _synthetic_tensor(model, *_count_and_shape(tensor), seed).view(tensor.shape).to(tensor)

        return inputs.map(synthesize)

    return [synthetic_inputs(seed + run) for run in range(BATCH if batches is None else batches)]


def falls_back_to_noise(inputs: Inputs) -> bool:
    """Return whether no synthetic image fits a tensor of the example, so that `synthetic_batches` gives noise there."""
    example = inputs.only_tensor
    if example is not None:
        return not (example.is_floating_point() and _is_image_or_clip(example.shape[1:]))
    floats = (tensor for tensor in inputs.tensors() if tensor.is_floating_point())
    return any(not _is_image_or_clip(_count_and_shape(tensor)[1]) for tensor in floats)


def values_per_channel(value: object) -> Tensor:
    """Return the mean or deviation that a model's config gives, as (C,); empty where it is no list of numbers.

    Anyone may write into the config of a model.
    """
    try:
        numbers = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    except Exception:  # noqa: BLE001 - torch raises a different kind for each wrong value
        return torch.empty(0, device="cpu")
    return numbers if numbers.ndim == 1 else torch.empty(0, device="cpu")


def _count_and_shape(tensor: Tensor) -> tuple[int, Sequence[int]]:
    """Return the number of items in a tensor of a structure, and the shape of an item.

    Up to three axes are a single item, as detectors take images (C, H, W).
    """
    return (tensor.shape[0], tensor.shape[1:]) if tensor.ndim > 3 else (1, tensor.shape)  # noqa: PLR2004 - (C, H, W)


def _is_image_or_clip(shape: Sequence[int]) -> bool:
    """Return whether a shape is (C, H, W) or (C, frames, H, W) with 1 or 3 channels."""
    return len(shape) in {3, 4} and shape[0] in {1, 3}


def _synthetic_tensor(model: nn.Module, count: int, shape: Sequence[int], seed: int) -> Tensor:
    """Return (count, *shape): normalized images or clips where the shape is one of theirs, noise otherwise."""
    if not _is_image_or_clip(shape):
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    channels, *frames, height, width = shape
    config = getattr(model, "pretrained_cfg", None) or {}
    values = [values_per_channel(config.get(key))[:channels] for key in ("mean", "std")]
    if any(len(numbers) != channels for numbers in values):
        values = [torch.tensor(numbers[:channels], device="cpu") for numbers in (_IMAGENET_MEAN, _IMAGENET_STD)]
    mean, std = (numbers.view(-1, 1, 1) for numbers in values)
    steps = sum(frames)
    images = dead_leaves(count, (height + steps, width + steps), seed=seed)  # (count, 3, H + steps, W + steps)
    images = ((images if channels == 3 else images.mean(1, keepdim=True)) - mean) / std  # noqa: PLR2004 - RGB
    if not frames:
        return images
    return torch.stack([images[..., step : step + height, step : step + width] for step in range(steps)], dim=2)
