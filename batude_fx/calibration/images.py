"""Calibration images of the user: checked, and brought into small batches on the model's device."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from operator import attrgetter
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from batude_fx.errors import CalibrationError
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import random_states_kept

ItemT = TypeVar("ItemT")
Images = Tensor | Iterable[Tensor | Sequence[Tensor]]
BATCH = 8  # images per batch; the backward passes keep the activations of one batch


class Reservoir(Generic[ItemT]):
    """Yields the items of an iterable, and keeps a uniform random sample of them, however many there are.

    Args:
        items: Any iterable.
        most: The largest number of items in the sample.
        keep: Function from an item to what is kept of it.

    Attributes:
        sample: The sample of the items that were yielded so far.

    Source: algorithm R in J. Vitter, "Random Sampling with a Reservoir", ACM Transactions on Mathematical Software
    11(1), 1985.
    """

    def __init__(
        self,
        items: Iterable[ItemT],
        *,
        most: int,
        keep: Callable[[ItemT], ItemT] = lambda item: item,
    ) -> None:
        self._items, self._most, self._keep = items, most, keep
        self.sample: list[ItemT] = []

    def __iter__(self) -> Iterator[ItemT]:
        """Yield the items one by one.

        With a sample of m, item n enters it with probability m / n, in place of a random item of the sample. Each
        earlier item was in it with probability m / (n - 1) and stays with probability 1 - 1 / n, which is m / n again.
        """
        generator = random.Random(0)  # noqa: S311 - no secret depends on it
        for index, item in enumerate(self._items):
            slot = generator.randrange(index + 1)
            if len(self.sample) < self._most:
                self.sample.append(self._keep(item))
            elif slot < self._most:
                self.sample[slot] = self._keep(item)
            yield item


def first_image_size(images: Images) -> tuple[tuple[int, ...] | None, Images]:
    """Return the size (C, H, W) of the first image, and images that still begin with it.

    The size is None where the first batch holds no images, of which `image_batches` says more. Drawing the batch leaves
    torch's global random generator where it is.
    """
    if isinstance(images, Tensor) or not isinstance(images, Iterable):
        return _image_size(images), images
    with random_states_kept(devices=()):
        iterator = iter(images)
        drawn = list(islice(iterator, 1))
    first: object = drawn[0] if drawn else None
    size = _image_size(first[0] if isinstance(first, Sequence) and len(first) else first)
    return size, chain(drawn, iterator)


def _image_size(batch: object) -> tuple[int, ...] | None:
    """Return (C, H, W) of a batch of images (N, C, H, W), else None."""
    return tuple(batch.shape[1:]) if isinstance(batch, Tensor) and batch.ndim == 4 else None  # noqa: PLR2004


def image_batches(images: Images, inputs: Inputs) -> Iterator[Inputs]:
    """Yield copies of the images in batches of at most 8 images of one shape, as arguments of the model.

    Args:
        images: A tensor (N, ...), or an iterable of batches of any size, each a tensor or an (images, labels) pair.
        inputs: The example input of a model that takes one tensor (1, ...); the batches get its dtype and device.

    Raises:
        CalibrationError: When the model takes anything but one tensor, or when a batch is no tensor, does not have the
            axes, channels and kind of dtype of the example, or is not finite.
    """
    example = inputs.only_tensor
    if example is None:
        raise CalibrationError(
            "calibration images need a model that takes one tensor (N, ...), this one takes other arguments. "
            'Use calibration="synthetic" or calibration=None.'
        )
    given: object = images
    if not isinstance(given, Tensor) and (hasattr(given, "__array__") or not isinstance(given, Iterable)):
        name = type(given).__name__
        raise CalibrationError(
            f"calibration is of type {name}, not a tensor (N, ...) or batches of images.{_hint(given)}"
        )
    batches: Iterable[object] = (images,) if isinstance(images, Tensor) else images
    yield from batched(_single_images(batches, example), inputs)


def batched(images: Iterable[Tensor], inputs: Inputs) -> Iterator[Inputs]:
    """Yield images in batches of at most 8 that follow each other and have one shape.

    Args:
        images: Images without a batch axis.
        inputs: The example input of a model that takes one tensor (1, ...); the batches get its dtype and device.
    """
    example = cast("Tensor", inputs.only_tensor)
    for _, images_of_one_shape in groupby(images, attrgetter("shape")):
        while batch := tuple(islice(images_of_one_shape, BATCH)):
            yield inputs.with_tensor(torch.stack(batch).to(example))


def _single_images(batches: Iterable[object], example: Tensor) -> Iterator[Tensor]:
    for index, item in enumerate(batches):
        batch = _checked_batch(item[0] if isinstance(item, Sequence) and len(item) else item, index, example)
        yield from (image.clone() for image in batch)  # a loader may fill the same tensor again


def _hint(value: object) -> str:
    """Return the way out for an array of another library."""
    return " Pass torch.as_tensor(array)." if hasattr(value, "__array__") else ""


def _checked_batch(batch: object, index: int, example: Tensor) -> Tensor:
    """Return the batch, or refuse one that the model does not take."""
    if not isinstance(batch, Tensor):
        raise CalibrationError(
            f"calibration batch {index} is of type {type(batch).__name__}, not a tensor (N, ...) or a pair of images "
            f"and labels.{_hint(batch)}"
        )
    if batch.ndim != example.ndim or batch.shape[1] != example.shape[1]:
        expected = ", ".join(["N", *map(str, example.shape[1:])])
        hint = " Add the batch axis: images.unsqueeze(0)." if batch.ndim == example.ndim - 1 else ""
        if batch.ndim == example.ndim and batch.shape[-1] == example.shape[1]:
            hint = " If its last axis is the channels, move it: images.movedim(-1, 1)."
            expected = f"N, {example.shape[1]}, ..."  # the example may have the size of these images
        raise CalibrationError(
            f"calibration batch {index} has shape {tuple(batch.shape)}, the model takes ({expected}).{hint}"
        )
    if batch.is_floating_point() != example.is_floating_point():
        way_out = (
            "normalize the images to floats first" if example.is_floating_point() else "do not convert them to floats"
        )
        raise CalibrationError(
            f"calibration batch {index} is {batch.dtype}, the model takes {example.dtype}; {way_out}."
        )
    if not batch.isfinite().all():
        raise CalibrationError(f"calibration batch {index} holds NaN or infinite values; check the loader.")
    return batch
