"""Whether calibration images look like those that a network was trained on: normalized alike, and not just a few.

A network calibrated with images from 0 to 255, where it expects a mean of 0, is wrong without any error. It is noticed
by the mean and standard deviation in timm's config, with which pixels become values from 0 to 1 again, or by the
statistics of its inputs in training that the first batch-norm holds.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from batude_fx.calibration.synthetic_inputs import values_per_channel
from batude_fx.graph.example_inputs import timm_config
from batude_fx.support.hooks import observe_calls
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy
from batude_fx.support.user_warning import warn_user

_FEW_IMAGES = 16
_MOST_OUTSIDE = 0.4  # share of the values that may be darker than black or brighter than white
_FURTHEST = 3.0  # standard deviations between the mean of a channel and the remembered one; also the ratio of the two
_FEWEST_STEPS = 30  # of training, after which running statistics with a momentum of 0.1 hold those of the images
_NDIM = 4  # (N, C, H, W)


class ImageCheck:
    """Passes batches of images on, and warns of them when all have been seen.

    Args:
        model: The network that is calibrated.
        batches: Arguments of the model.
        example: The example input, on which flops are counted.
        name: What the warnings call the images.
        purpose: What is uncertain with few images, such as "ranks chosen by".
    """

    def __init__(
        self, model: nn.Module, batches: Iterator[Inputs], example: Inputs, *, name: str = "calibration",
        purpose: str = "ranks chosen by",
    ) -> None:  # fmt: skip
        self._model, self._batches, self._example = model, batches, example
        self._name, self._purpose = name, purpose
        self._count, self._sizes = 0, set[tuple[int, ...]]()

    def __iter__(self) -> Iterator[Inputs]:
        """Yield the batches.

        Warns:
            UserWarning: When images are few, of several sizes, or not normalized as the network expects.
        """
        first = next(self._batches, None)
        if first is not None:
            self._warn_unless_normalized(first)
        for batch in chain(() if first is None else (first,), self._batches):
            image = batch.tensors()[0]
            self._count += len(image)
            self._sizes.add(tuple(image.shape[2:]))
            yield batch
        if len(self._sizes) > 1:
            sizes = " and ".join(map(_pixels, sorted(self._sizes)))
            counted = _pixels(self._example.tensors()[0].shape[2:])
            warn_user(
                f"{self._name} images have {sizes} pixels; flops are counted at {counted}, and on images of other "
                "sizes the budget may be exceeded. Resize them to one size."
            )
        if 0 < self._count < _FEW_IMAGES:
            images = "1 image" if self._count == 1 else f"{self._count} images"
            warn_user(f"{self._name} has only {images}; {self._purpose} so few are uncertain. Give 128 or more.")

    def _warn_unless_normalized(self, batch: Inputs) -> None:
        images = batch.only_tensor
        if images is None or images.ndim != _NDIM or not images.is_floating_point():
            return
        reason = _mistake_by_config(images, timm_config(self._model)) or _mistake_by_norm(self._model, batch)
        if reason:
            warn_user(f"{self._name} images look as if they were not normalized as the network expects: {reason}.")


def _pixels(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _mistake_by_config(images: Tensor, config: Any) -> str:  # noqa: ANN401 - a mapping of many types
    """Return what is wrong with images (N, C, H, W) that should have been normalized by a config; empty if nothing."""
    channels = images.shape[1]
    mean, std = (values_per_channel(config.get(key)).to(images) for key in ("mean", "std"))  # (C,) each
    if len(mean) != channels or len(std) != channels:
        return ""
    pixels = images * std[:, None, None] + mean[:, None, None]  # from 0, black, to 1, white
    outside = ((pixels < 0) | (pixels > 1)).float().mean().item()
    found = f"their channels have means {_numbers(images.mean((0, 2, 3)))}"
    wanted = f"normalized by mean {_numbers(mean)} and std {_numbers(std)} they would be near 0"
    if outside > _MOST_OUTSIDE:
        return f"{found}, {wanted}, and {outside:.0%} of their values are below black or above white"
    if mean.min() > 0.1 and images.min() >= 0:  # noqa: PLR2004 - a photo without any pixel below the mean is rare
        return f"{found} and no value is negative, {wanted}"
    return ""


def _mistake_by_norm(model: nn.Module, batch: Inputs) -> str:
    """Return how the inputs of the first batch-norm differ from those that it remembers; empty if not by much."""
    found: list[tuple[str, Tensor, nn.BatchNorm2d]] = []

    def note(name: str, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if not found and args and isinstance(args[0], Tensor):
            found.append((name, args[0].float(), norms[name]))

    with private_copy(model) as copied:
        norms = {
            name: cast("nn.BatchNorm2d", module)
            for name, module in copied.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats  # noqa: SLF001
        }
        try:
            with torch.no_grad(), observe_calls(norms, before=note):
                batch.copies().run(copied)
        except Exception:  # noqa: BLE001 - calibration itself says why the model does not run
            return ""
    if not found:
        return ""
    name, x, norm = found[0]
    mean, variance = cast("Tensor", norm.running_mean).float(), cast("Tensor", norm.running_var).float()
    steps = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)  # 0 also in converted weights
    if 0 < steps < _FEWEST_STEPS or (not mean.any() and (variance == 1).all()):  # hardly trained, or never
        return ""
    values = x.movedim(1, 0).flatten(1)  # (C, n)
    tiny = torch.finfo(variance.dtype).tiny
    distance = ((values.mean(1) - mean) / variance.clamp_min(tiny).sqrt()).square().mean().sqrt().item()
    ratio = (values.var(1).clamp_min(tiny) / variance.clamp_min(tiny)).log().mean().div(2).exp().item()
    if distance < _FURTHEST and 1 / _FURTHEST < ratio < _FURTHEST:
        return ""
    return (
        f"at {name}, the first batch-norm, channel means are {distance:.3g} standard deviations from those of "
        f"training, and standard deviations are {ratio:.3g} times those of training; 0 and 1 are expected"
    )


def _numbers(values: Tensor) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:4].tolist() if math.isfinite(value))
    return shown + (", ..." if len(values) > 4 else "")  # noqa: PLR2004 - as many as are shown
