"""Run a network and its original on the same images, and compare what they give."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from batude_fx.quality.quality import SURE_MARGIN, OutputError, Quality, Share, divergence_of
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy
from batude_fx.support.progress import track

_CLASSIFIER_NDIM = 2  # (N, classes)
_IMAGE_NDIM = 4  # (N, C, H, W)
Outputs = dict[str, Tensor]


@dataclass
class QualityMeter:
    """Compares networks with the one that they were compressed from, which runs once on each image.

    Attributes:
        original: The network that was compressed.
        batches: Arguments of a run, batches of images that no network was fitted to; at least one.
        synthetic: Whether the images were generated.
    """

    original: nn.Module
    batches: Sequence[Inputs]
    synthetic: bool
    _logits: list[Tensor] = field(default_factory=list)  # of a classifier; other outputs may be too large to keep

    @torch.no_grad()
    def measure(self, network: nn.Module) -> Quality:
        """Compare the outputs of a network with the original's, both in eval mode.

        Args:
            network: The compressed network, which takes and gives the same.

        Returns:
            The figures of a classifier if there is one output (N, classes) of at least two classes, else the error of
            each output tensor.
        """
        images, logits, errors = 0, list[Tensor](), dict[str, _ErrorSums]()
        known = list(self._logits)
        classifies = getattr(self.original, "num_classes", None) != 0  # timm's networks without a head give features
        with private_copy(self.original) as first, private_copy(network) as second:
            for index, batch in enumerate(track(self.batches, "measuring quality")):
                expected = {"output": known[index]} if known else _outputs(first, batch)
                actual = _outputs(second, batch)
                count = max((len(tensor) for tensor in batch.tensors() if tensor.ndim), default=1)
                classifies = classifies and _gives_classes(expected, count) and _gives_classes(actual, count)
                if classifies:
                    self._logits += [] if known else expected.values()
                    logits += actual.values()
                for name in expected.keys() | actual.keys():
                    sums = errors.setdefault(name, _ErrorSums())
                    sums.add(expected.get(name), actual.get(name), batch.only_tensor)
                images += count
        if classifies:
            return _quality_of_classes(torch.cat(self._logits), torch.cat(logits), synthetic=self.synthetic)
        self._logits.clear()
        outputs = tuple(errors[name].result(name) for name in sorted(errors))
        return Quality(images=images, synthetic=self.synthetic, outputs=outputs)


def _outputs(network: nn.Module, batch: Inputs) -> Outputs:
    """Return every output tensor of numbers by its place among the outputs."""
    leaves = tree_leaves_with_path(batch.copies().run(network))  # networks may work on their inputs in place
    tensors = ((keystr(path) or "output", leaf) for path, leaf in leaves if isinstance(leaf, Tensor))
    return {name: tensor.double().cpu() for name, tensor in tensors if not tensor.is_complex()}


def _gives_classes(outputs: Outputs, images: int) -> bool:
    shapes = [tensor.shape for tensor in outputs.values()]
    return len(shapes) == 1 and len(shapes[0]) == _CLASSIFIER_NDIM and shapes[0][0] == images and shapes[0][1] > 1


def _quality_of_classes(expected: Tensor, actual: Tensor, *, synthetic: bool) -> Quality:
    """Return the figures of a classifier.

    Args:
        expected: Scores (N, classes) of the original.
        actual: Scores (N, classes) of the network.
        synthetic: Whether the images were generated.
    """
    log_probs, other_log_probs = F.log_softmax(expected, 1), F.log_softmax(actual, 1)
    divergences = F.kl_div(other_log_probs, log_probs, reduction="none", log_target=True).sum(1)  # (N,)
    first, second = log_probs.exp().topk(2).values.unbind(1)
    sure = first - second >= SURE_MARGIN
    # A network that gives NaN agrees with nothing.
    hits = (expected.argmax(1) == actual.argmax(1)) & actual.isfinite().all(1)
    return Quality(
        images=len(expected),
        synthetic=synthetic,
        divergence=divergence_of(divergences.tolist()),
        agreement=_share(hits),
        sure_agreement=_share(hits[sure]) if sure.any() else None,
    )


def _share(hits: Tensor) -> Share:
    return Share(hits=int(hits.sum()), images=len(hits))


@dataclass
class _ErrorSums:
    """Running sums over the values of one output.

    Attributes:
        count: Number of values.
        total: Sum of the original's values.
        squares: Sum of their squares.
        errors: Sum of the squared differences.
        least: The smallest of the original's values.
        most: The largest of them.
        comparable: Whether both networks have always given tensors of one shape.
        is_image: Whether the output always had the size of the input image.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    errors: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")
    comparable: bool = True
    is_image: bool = True

    def add(self, expected: Tensor | None, actual: Tensor | None, image: Tensor | None) -> None:
        """Add the outputs of one batch."""
        if expected is None or actual is None or expected.shape != actual.shape:
            self.comparable = False
            return
        if not expected.numel():
            return
        self.count += expected.numel()
        self.total += float(expected.sum())
        self.squares += float(expected.square().sum())
        self.errors += float((expected - actual).square().sum())
        self.least, self.most = min(self.least, float(expected.min())), max(self.most, float(expected.max()))
        self.is_image &= image is not None and image.ndim == _IMAGE_NDIM and image.shape == expected.shape

    def result(self, name: str) -> OutputError:
        """Return the figures; those that are not finite are left out."""
        if not (self.comparable and self.count):
            return OutputError(name=name, relative_error=None)
        variance = self.squares - self.total**2 / self.count
        peak = (self.most - self.least) ** 2 * self.count  # times the mean squared error
        return OutputError(
            name=name,
            relative_error=_ratio(self.errors, self.squares),
            r_squared=None if (unexplained := _ratio(self.errors, variance)) is None else 1 - unexplained,
            psnr=10 * math.log10(ratio) if self.is_image and (ratio := _ratio(peak, self.errors)) else None,
        )


def _ratio(part: float, whole: float) -> float | None:
    """Return a ratio; None where it is not finite."""
    return part / whole if whole > 0 and math.isfinite(part) and math.isfinite(part / whole) else None
