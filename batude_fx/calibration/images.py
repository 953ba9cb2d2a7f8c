"""Images for calibration: the user's, checked and in small batches, and procedural ones; and what they measure, mixed.

Without images of the user, procedural ones stand in (`synthetic`). Their statistics are wrong for the network in one
respect that can be mended: its batch-norm layers know the mean and variance of every channel on the images it was
trained on. So the network that is measured normalizes by the statistics of the *synthetic* images: then every layer
receives channels with the mean and variance it knows from training, and only their correlations are synthetic.

Source: batch-norm as a memory of the training images: H. Yin et al., "Dreaming to Distill", CVPR 2020,
https://arxiv.org/abs/1912.08795.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import attrgetter

import torch
from torch import Tensor

from batude_fx.errors import CalibrationError

Images = Tensor | Iterable[Tensor | Sequence[Tensor]]
Inputs = tuple[object, ...]
BATCH = 8  # the backward passes keep the activations of this many images
_KEPT = 8  # batches that later pass through the compressed network


class BatchReservoir:
    """Passes batches on and keeps a few of them, each as likely as any other, however many there are.

    Attributes:
        kept: Up to `_KEPT` batches.
    """

    def __init__(self, batches: Iterable[Inputs]) -> None:
        self._batches = batches
        self.sample: list[Inputs] = []

    def __iter__(self) -> Iterator[Inputs]:
        """Reservoir sampling: Vitter's algorithm R, ACM Transactions on Mathematical Software 11(1), 1985."""
        chance = random.Random(0)  # noqa: S311 - no secret depends on it
        for index, batch in enumerate(self._batches):
            slot = chance.randrange(index + 1)
            if len(self.sample) < _KEPT:
                self.sample.append(batch)
            elif slot < _KEPT:
                self.sample[slot] = batch
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
    like = only_tensor(inputs)
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
        while some := tuple(islice(alike, BATCH)):
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


def only_tensor(inputs: Inputs) -> Tensor | None:
    """The tensor of inputs that hold nothing else; None where they are a structure."""
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None
