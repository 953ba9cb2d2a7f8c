"""Images for calibration: the user's, checked and in small batches, and procedural ones; and what they measure, mixed.

Without images of the user, procedural ones stand in (`synthetic`). Their statistics are wrong for the network in one
respect that can be mended: its batch-norm layers know the mean and variance of every channel on the images it was
trained on. So the network that is measured normalizes by the statistics of the *synthetic* images: then every layer
receives channels with the mean and variance it knows from training, and only their correlations are synthetic.

Source: batch-norm as a memory of the training images: H. Yin et al., "Dreaming to Distill", CVPR 2020,
https://arxiv.org/abs/1912.08795.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from operator import attrgetter
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batude_fx.borrowing import borrowed, outputs
from batude_fx.errors import CalibrationError
from batude_fx.spectra import Metric, ModeMetric
from batude_fx.surgery import copied
from batude_fx.synthetic import dead_leaves

Images = Tensor | Iterable[Tensor | Sequence[Tensor]]
Inputs = tuple[object, ...]
ModelT = TypeVar("ModelT", bound=nn.Module)

SYNTHETIC_IMAGES = 96
SYNTHETIC_CLIPS = 16
SYNTHETIC_DRAWS = 2  # where they are all there is: few images need several random combinations of the outputs
_BATCH = 8  # the backward passes keep the activations of this many images
_KEPT = 8  # batches that later pass through the compressed network
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Keeper:
    """Passes batches on and keeps a few of them, each as likely as any other, however many there are.

    Attributes:
        kept: Up to `_KEPT` batches.
    """

    def __init__(self, batches: Iterable[Inputs]) -> None:
        self._batches = batches
        self.kept: list[Inputs] = []

    def __iter__(self) -> Iterator[Inputs]:
        """Reservoir sampling: Vitter's algorithm R, ACM Transactions on Mathematical Software 11(1), 1985."""
        chance = random.Random(0)  # noqa: S311 - no secret depends on it
        for index, batch in enumerate(self._batches):
            slot = chance.randrange(index + 1)
            if len(self.kept) < _KEPT:
                self.kept.append(batch)
            elif slot < _KEPT:
                self.kept[slot] = batch
            yield batch


def image_batches(images: Images, inputs: Inputs) -> Iterator[Inputs]:
    """Checked copies in small batches of one size on the model's device, whatever size those of the user have.

    Args:
        images: A tensor (N, ...), or an iterable of batches, each a tensor or an (images, labels) pair.
        inputs: The example input of a model that takes one tensor (1, ...): shape, dtype and device.

    Raises:
        CalibrationError: When the model takes something else, or a batch has another shape than the example, is not
            finite, or is no tensor.
    """
    like = _only_tensor(inputs)
    if like is None:
        raise CalibrationError(
            "calibration images need a model that takes one tensor (N, ...), this one takes a structure. "
            'Use calibration="synthetic" or calibration=None.'
        )
    if not isinstance(images, Iterable):
        raise CalibrationError(f"calibration is a {type(images).__name__}, not a tensor (N, ...) or batches of images.")
    source: Iterable[object] = (images,) if isinstance(images, Tensor) else images

    def single() -> Iterator[Tensor]:
        for index, item in enumerate(source):
            batch = _checked_batch(item[0] if isinstance(item, Sequence) and len(item) else item, index, like)
            yield from (image.clone() for image in batch)  # a loader may fill the same tensor again

    for _, alike in groupby(single(), attrgetter("shape")):
        while some := tuple(islice(alike, _BATCH)):
            yield (torch.stack(some).to(like),)


def _checked_batch(batch: object, index: int, like: Tensor) -> Tensor:
    if not isinstance(batch, Tensor):
        raise CalibrationError(
            f"calibration batch {index} is a {type(batch).__name__}, not a tensor (N, ...) or an (images, labels) pair."
        )
    if batch.ndim != like.ndim or batch.shape[1] != like.shape[1]:
        expected = ", ".join(["N", *map(str, like.shape[1:])])
        hint = " Add the batch axis: images.unsqueeze(0)." if batch.ndim == like.ndim - 1 else ""
        raise CalibrationError(
            f"calibration batch {index} has shape {tuple(batch.shape)}, the model takes ({expected}).{hint}"
        )
    if batch.is_floating_point() != like.is_floating_point():
        way_out = "normalize the images to floats first" if like.is_floating_point() else "give them as they come"
        raise CalibrationError(f"calibration batch {index} is {batch.dtype}, the model takes {like.dtype}; {way_out}.")
    if not batch.isfinite().all():
        raise CalibrationError(f"calibration batch {index} holds NaN or infinite values; check the loader.")
    return batch


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
    like = _only_tensor(inputs)
    if like is not None and like.is_floating_point():
        count = SYNTHETIC_CLIPS if like.ndim > 4 else SYNTHETIC_IMAGES  # noqa: PLR2004 - (N, C, frames, H, W)
        images = _synthetic_tensor(model, count, like.shape[1:], seed).to(like)
        return [(batch,) for batch in torch.split(images, _BATCH)]

    def like_example(run: int) -> Inputs:
        def one(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return _synthetic_tensor(model, *_items(tensor), seed + run).view(tensor.shape).to(tensor)

        return cast("Inputs", tree_map_only(Tensor, one, inputs))

    return [like_example(run) for run in range(_BATCH)]


def sees_noise(inputs: Inputs) -> bool:
    """Whether `synthetic_batches` makes noise of any tensor of the example, as no procedural image fits it."""
    like = _only_tensor(inputs)
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


def _only_tensor(inputs: Inputs) -> Tensor | None:
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None


def normalized_by(model: ModelT, batches: Sequence[Inputs]) -> ModelT:
    """A copy of the model whose batch-norm layers hold the statistics of these batches.

    Args:
        model: Left as it is.
        batches: Arguments of the model.

    Returns:
        A copy in eval mode; `model` itself where it has no batch-norm with running statistics, or one that sees too
        little to normalize.
    """
    if not any(_has_running_statistics(module) for module in model.modules()):
        return model
    adapted = copied(model)
    adapted.eval()
    for module in adapted.modules():
        if _has_running_statistics(module):
            norm = cast("nn.BatchNorm2d", module)
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
    try:
        with borrowed(model), torch.no_grad():  # for the random generators, which the copy may draw from
            for batch in batches:
                outputs(adapted, batch)
    except ValueError:  # a layer that sees one value per channel has no variance to normalize by
        return model
    for module, before in zip(adapted.modules(), model.modules(), strict=True):
        if _has_running_statistics(module):
            cast("nn.BatchNorm2d", module).momentum = cast("nn.BatchNorm2d", before).momentum
    adapted.eval()
    return adapted


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Name to value of the buffers that `normalized_by` sets."""
    norms = {name: module for name, module in model.named_modules() if _has_running_statistics(module)}
    return {f"{name}.{key}": value for name, norm in norms.items() for key, value in norm.named_buffers(recurse=False)}


def mixed(own: Mapping[str, Metric], synthetic: Mapping[str, Metric]) -> dict[str, Metric]:
    """Statistics of the user's images, half and half with synthetic ones: few images of one kind are not all there is.

    Sensitivities are brought to the same total error first.
    """
    own_total, synthetic_total = _total(own), _total(synthetic)
    scale = own_total / synthetic_total if synthetic_total else 1.0

    def half(a: ModeMetric | None, b: ModeMetric | None) -> ModeMetric | None:
        if a is None or b is None:
            return a
        sensitivity = (a.sensitivity + scale * b.sensitivity) / 2
        return ModeMetric((a.covariance + b.covariance) / 2, sensitivity)

    pairs = {name: (metric, synthetic.get(name, metric)) for name, metric in own.items()}
    return {name: Metric(half(a.out, b.out), half(a.in_, b.in_)) for name, (a, b) in pairs.items()}


def _total(measured: Mapping[str, Metric]) -> float:
    """What the network would lose if every site lost everything."""
    return sum(cast("ModeMetric", metric.out or metric.in_).total() for metric in measured.values())


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats  # noqa: SLF001
