"""Images for calibration: the user's, checked and in small batches, and procedural ones; and what they measure, mixed.

Without images of the user, procedural ones stand in (`synthetic`). Their statistics are wrong for the network in one
respect that can be mended: its batch-norm layers know the mean and variance of every channel on the images it was
trained on. So the network that is measured normalizes by the statistics of the *synthetic* images: then every layer
receives channels with the mean and variance it knows from training, and only their correlations are synthetic.

Source: batch-norm as a memory of the training images: H. Yin et al., "Dreaming to Distill", CVPR 2020,
https://arxiv.org/abs/1912.08795.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batude_fx.calibration.dead_leaves import dead_leaves
from batude_fx.calibration.images import BATCH, Inputs, only_tensor

SYNTHETIC_IMAGES = 96
SYNTHETIC_CLIPS = 16
SYNTHETIC_DRAWS = 2  # where they are all there is: few images need several random combinations of the outputs
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def synthetic_batches(model: nn.Module, inputs: Inputs, *, seed: int = 0) -> list[Inputs]:
    """Procedural inputs for a model, of the structure of its example input.

    Args:
        model: timm models know the mean and standard deviation they want; ImageNet's are taken for all others.
        inputs: The example input.
        seed: Of the images.

    Returns:
        Batches of dead leaves wherever the example has images (1, 1 or 3 channels, H, W) or clips (1, 1 or 3 channels,
        frames, H, W), which pan over them; Gaussian noise of the example's shape elsewhere, and integers as they are.
    """
    like = only_tensor(inputs)
    if like is not None and like.is_floating_point():
        count = SYNTHETIC_CLIPS if like.ndim > 4 else SYNTHETIC_IMAGES  # noqa: PLR2004 - (N, C, frames, H, W)
        images = _synthetic_tensor(model, count, like.shape[1:], seed).to(like)
        return [(batch,) for batch in torch.split(images, BATCH)]

    def like_example(run: int) -> Inputs:
        def one(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return _synthetic_tensor(model, *_items(tensor), seed + run).view(tensor.shape).to(tensor)

        return cast("Inputs", tree_map_only(Tensor, one, inputs))

    return [like_example(run) for run in range(BATCH)]


def falls_back_to_noise(inputs: Inputs) -> bool:
    """Whether `synthetic_batches` makes noise of any tensor of the example, as no procedural image fits it."""
    like = only_tensor(inputs)
    if like is not None:
        return not (like.is_floating_point() and _is_picture(like.shape[1:]))
    floats = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return any(not _is_picture(_items(tensor)[1]) for tensor in floats)


def _items(tensor: Tensor) -> tuple[int, Sequence[int]]:
    """How many items a tensor inside a structure holds, and the shape of one: detectors take images without a batch."""
    return (tensor.shape[0], tensor.shape[1:]) if tensor.ndim > 3 else (1, tensor.shape)  # noqa: PLR2004 - (C, H, W)


def _is_picture(shape: Sequence[int]) -> bool:
    """(C, H, W) or (C, frames, H, W)."""
    return len(shape) in {3, 4} and shape[0] in {1, 3}


def _synthetic_tensor(model: nn.Module, count: int, shape: Sequence[int], seed: int) -> Tensor:
    if not _is_picture(shape):
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    channels, *frames, height, width = shape
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (
        torch.tensor(config.get(key, default)[:channels], device="cpu").view(-1, 1, 1)
        for key, default in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD))
    )
    steps = sum(frames)
    images = dead_leaves(
        count, (height + steps, width + steps), seed=seed
    )  # (count, 3, H, W), and a margin to pan over
    images = ((images if channels == 3 else images.mean(1, keepdim=True)) - mean) / std  # noqa: PLR2004 - RGB
    if not frames:
        return images
    return torch.stack([images[..., step : step + height, step : step + width] for step in range(steps)], dim=2)
