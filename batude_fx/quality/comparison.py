"""Run a network and its original on the same images, and compare what they give."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batude_fx.quality.quality import SURE_MARGIN, OutputError, Quality, Share, divergence_of
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy
from batude_fx.support.progress import track

_CLASSIFIER_NDIM = 2  # (N, classes)
_IMAGE_NDIM = 4  # (N, C, H, W)
_ONE = 1e-3  # how far probabilities may add up to something else than 1
Outputs = dict[str, Tensor]


@dataclass
class QualityMeter:
    """Compares networks with the one that they were compressed from, which runs once if it is a classifier.

    Attributes:
        original: The network that was compressed.
        batches: Arguments of a run, batches of images that no network was fitted to; they are iterated anew each time.
        synthetic: Whether the images were generated.
    """

    original: nn.Module
    batches: Iterable[Inputs]
    synthetic: bool
    _classes: "list[Outputs] | None" = None  # of the original; other outputs may be too large to keep

    @property
    def images(self) -> int:
        """The number of images; a run of a model that does not take one tensor counts as one."""
        return sum(map(_count, self.batches))

    @torch.no_grad()
    def measure(self, network: nn.Module) -> Quality | None:
        """Compare the outputs of a network with the original's, both in eval mode.

        Args:
            network: The compressed network, which takes and gives the same.

        Returns:
            The figures of a classifier if there is one output (N, classes) of at least two classes, else the error of
            each output tensor; None where there is none to compare, as there are no images or no outputs.
        """
        known = self._classes
        expected, actual, errors = list[Outputs](), list[Outputs](), dict[str, _ErrorSums]()
        classifies = getattr(self.original, "num_classes", None) != 0  # timm's networks without a head give features
        with private_copy(self.original) as first, private_copy(network) as second:
            for index, batch in enumerate(track(self.batches, "measuring quality")):
                pair = (known[index] if known else _outputs(first, batch)), _outputs(second, batch)
                classifies = classifies and all(_gives_classes(outputs, _count(batch)) for outputs in pair)
                if classifies:
                    expected.append(pair[0])
                    actual.append(pair[1])
                for name in sorted(pair[0].keys() | pair[1].keys()):
                    sums = errors.setdefault(name, _ErrorSums())
                    sums.add(pair[0].get(name), pair[1].get(name), batch.only_tensor)
        if not errors:
            return None
        if classifies:
            self._classes = expected
            return _quality_of_classes(_scores(expected), _scores(actual), synthetic=self.synthetic)
        outputs = tuple(sums.result(name) for name, sums in errors.items() if not sums.is_empty)
        return Quality(images=self.images, synthetic=self.synthetic, outputs=outputs) if outputs else None


def _count(batch: Inputs) -> int:
    tensor = batch.only_tensor
    return len(tensor) if tensor is not None and tensor.ndim else 1


def _outputs(network: nn.Module, batch: Inputs) -> Outputs:
    """Return every output tensor, on the CPU, by its place among the outputs."""
    result = batch.copies().run(network)  # networks may work on their inputs in place
    return {name or "output": tensor.cpu() for name, tensor in output_tensors(result)}


def output_tensors(value: object, *place: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in dicts, lists, tuples and dataclasses, at any depth, each with its place: "0.boxes"."""
    if isinstance(value, Tensor):
        yield ".".join(map(str, place)), torch.view_as_real(value) if value.is_complex() else value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from output_tensors(item, *place, key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from output_tensors(item, *place, index)
    elif is_dataclass(value):
        for part in fields(value):
            yield from output_tensors(getattr(value, part.name), *place, part.name)


def _gives_classes(outputs: Outputs, images: int) -> bool:
    shapes = [tensor.shape for tensor in outputs.values() if tensor.is_floating_point()]
    is_one = len(outputs) == len(shapes) == 1
    return is_one and len(shapes[0]) == _CLASSIFIER_NDIM and shapes[0][0] == images and shapes[0][1] > 1


def _scores(outputs: Sequence[Outputs]) -> Tensor:
    """Return the scores of all images, (N, classes)."""
    return torch.cat([tensor.double() for batch in outputs for tensor in batch.values()])


def log_probabilities(scores: Tensor) -> Tensor:
    """Return log-probabilities (N, classes); scores that are probabilities already are not normalized again."""
    if (scores >= 0).all() and ((scores.sum(1) - 1).abs() < _ONE).all():
        return scores.clamp_min(torch.finfo(torch.float32).tiny).log()
    return F.log_softmax(scores, 1)


def _quality_of_classes(expected: Tensor, actual: Tensor, *, synthetic: bool) -> Quality:
    """Return the figures of a classifier.

    Args:
        expected: Scores (N, classes) of the original.
        actual: Scores (N, classes) of the network.
        synthetic: Whether the images were generated.
    """
    log_probs, other_log_probs = log_probabilities(expected), log_probabilities(actual)
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
        equal: Number of values that are the same.
        total: Sum of the original's values.
        squares: Sum of their squares.
        errors: Sum of the squared differences.
        least: The smallest of the original's values.
        most: The largest of them.
        same_shapes: Whether both networks have always given tensors of one shape.
        finite: Whether all values of both were finite.
        is_image: Whether the output always had the size of the input image.
        is_label: Whether the values are integers or truth values, whose differences mean nothing.
    """

    count: int = 0
    equal: int = 0
    total: float = 0.0
    squares: float = 0.0
    errors: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    same_shapes: bool = True
    finite: bool = True
    is_image: bool = True
    is_label: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to compare."""
        return self.same_shapes and not self.count

    def add(self, expected: Tensor | None, actual: Tensor | None, image: Tensor | None) -> None:
        """Add the outputs of one batch."""
        if expected is None or actual is None or expected.shape != actual.shape:
            self.same_shapes = False
            return
        if not expected.numel():
            return
        self.count += expected.numel()
        self.equal += int((expected == actual).sum())
        self.is_label |= not expected.is_floating_point()
        self.finite &= bool(expected.isfinite().all() and actual.isfinite().all())
        expected, actual = expected.float(), actual.float()
        self.total += float(expected.sum(dtype=torch.float64))
        self.squares += float(expected.square().sum(dtype=torch.float64))
        self.errors += float((expected - actual).square().sum(dtype=torch.float64))
        self.least, self.most = min(self.least, float(expected.min())), max(self.most, float(expected.max()))
        self.is_image &= image is not None and image.ndim == _IMAGE_NDIM and image.shape == expected.shape

    def result(self, name: str) -> OutputError:
        """Return the figures, or why there are none."""
        if not self.same_shapes:
            return OutputError(name=name, problem="other shapes")
        if not self.finite:
            return OutputError(name=name, problem="not finite")
        if self.is_label:
            return OutputError(name=name, equal=self.equal / self.count)
        if not self.squares:
            return OutputError(name=name, problem="zero in the original")
        unexplained = _ratio(self.errors, self.squares - self.total**2 / self.count)
        peak = _ratio((self.most - self.least) ** 2 * self.count, self.errors)  # times the mean squared error
        return OutputError(
            name=name,
            relative_error=self.errors / self.squares,
            r_squared=None if unexplained is None else 1 - unexplained,
            psnr=10 * math.log10(peak) if self.is_image and peak else None,
        )


def _ratio(part: float, whole: float) -> float | None:
    """Return a ratio; None where it is not finite."""
    return part / whole if whole > 0 and math.isfinite(part / whole) else None
