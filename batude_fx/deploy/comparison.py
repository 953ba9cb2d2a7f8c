"""How the outputs of an exported file compare with those of the network that it was written from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import ExportError
from batude_fx.support.inputs import Inputs
from batude_fx.support.numbers import wilson_interval

_CLASSIFIER_NDIM = 2  # (N, classes)
_TINY = 1e-12
Runner = Callable[[Inputs], list[Tensor]]
"""Runs an exported file, and returns all of its outputs."""


@dataclass(frozen=True)
class Comparison:
    """Outputs of a file beside those of the network, on the same images.

    Attributes:
        difference: The largest difference between two outputs, relative to the largest output.
        relative_error: The sum of all squared differences, relative to that of all squared outputs.
        images: Number of images.
        agreement: Share of the images for which both have the same top class; None where the outputs are not one row of
            scores per image.
        inputs: Name to shape of each input of the file, in which "batch", "height" and "width" may have any size.
    """

    difference: float
    relative_error: float
    images: int
    agreement: float | None
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def agreement_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the agreement, by Wilson."""
        return None if self.agreement is None else wilson_interval(round(self.agreement * self.images), self.images)


@torch.no_grad()
def compare(network: nn.Module, run: Runner, batches: Iterable[Inputs]) -> Comparison:
    """Run a network and its file on batches of images, and compare their outputs.

    Raises:
        ExportError: When their outputs do not have the same shapes.
    """
    differences, errors, squares, images, same_classes = [0.0], 0.0, 0.0, 0, 0
    is_classifier = True
    for batch in batches:
        expected = [leaf for leaf in tree_leaves(batch.copies().run(network)) if isinstance(leaf, Tensor)]
        outputs = run(batch.copies())  # both may work on their inputs in place
        shapes, expected_shapes = ([tuple(tensor.shape) for tensor in tensors] for tensors in (outputs, expected))
        if shapes != expected_shapes:
            raise ExportError(f"outputs are {shapes}, not {expected_shapes}")
        for wanted, output in zip(expected, outputs, strict=True):
            gap = _gaps(wanted, output)
            finite = wanted.double()[wanted.isfinite()]
            differences.append(float(gap.max()) / max(float(finite.abs().max()) if len(finite) else 0, _TINY))
            errors += float(gap.square().sum())
            squares += float(finite.square().sum())
        is_classifier &= len(expected) == 1 and expected[0].ndim == _CLASSIFIER_NDIM
        images += len(batch.tensors()[0])
        if is_classifier:
            same_classes += int((expected[0].argmax(1) == outputs[0].argmax(1)).sum())
    difference = float(np.max(differences))  # NaN if one of them is NaN
    agreement = same_classes / images if is_classifier else None
    return Comparison(difference, errors / max(squares, _TINY), images, agreement)


def _gaps(expected: Tensor, output: Tensor) -> Tensor:
    """Return the differences of two tensors; infinities and NaN differ by 0 from the same, else by infinity or NaN."""
    expected, output = expected.double(), output.double()
    same = (expected == output) | (expected.isnan() & output.isnan())
    return torch.where(same, 0, (expected - output).abs())
