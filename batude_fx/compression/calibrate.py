"""What `plan` measures on images: the metric of every site, and what the compressed network is matched with later."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from torch import Tensor, nn

from batude_fx.calibration.batch_norm import renormalize, running_statistics
from batude_fx.calibration.images import BATCH, Images, Reservoir, batched, first_image_size, image_batches
from batude_fx.calibration.plausibility import ImageCheck
from batude_fx.calibration.statistics import average_metrics, statistics
from batude_fx.calibration.synthetic_inputs import SYNTHETIC_DRAWS, falls_back_to_noise, synthetic_batches
from batude_fx.errors import BudgetError, DiscoveryError
from batude_fx.graph.example_inputs import image_of_size, resolve_inputs
from batude_fx.graph.sites import ConvSite
from batude_fx.quality.held_back import HoldsBack
from batude_fx.support.inputs import ExampleInputs, Inputs
from batude_fx.support.numbers import fewest_trials
from batude_fx.support.progress import track
from batude_fx.support.user_warning import warn_user
from batude_fx.tucker.metric import Metric

Calibration = Images | Literal["synthetic"] | None
_FEWEST_TO_SHOW, _MOST_TO_SHOW = 128, 1024  # images that are held back where an agreement is asked for
_SAMPLE = 8  # batches that moments are matched on
_MOST_BYTES = 2**29  # of the images that are kept, to restore networks with: 890 of 224 x 224 pixels
_SYNTHETIC_SEED = 1000  # of what is held back, far from that of the images for calibration


@dataclass(frozen=True)
class _HeldBack:
    """How much is held back.

    Attributes:
        every: One of this many images of the user's.
        most: Most of these images.
        synthetic: Number of generated images.
    """

    every: int = 5
    most: int = 64
    synthetic: int = 32

    @classmethod
    def to_show(cls, agreement: float | None) -> "_HeldBack":
        """Return more where an agreement is asked for, so that a network may miss some of the images and show it.

        Raises:
            BudgetError: When so many images would be needed that they would not fit into memory.
        """
        if agreement is None:
            return cls()
        images = max(_FEWEST_TO_SHOW, math.ceil(1.5 * fewest_trials(agreement)))
        if images > _MOST_TO_SHOW:
            raise BudgetError(
                f"an agreement of {agreement:g} can be shown by {images:,} images only, and {_MOST_TO_SHOW:,} are held "
                "back at most; ask for 0.99, or measure it yourself and give Budget(score=...) and evaluate=."
            )
        return cls(every=2, most=images, synthetic=images)


@dataclass(frozen=True)
class Measurements:
    """What was measured on images; all of it is empty for weights only.

    Attributes:
        metrics: Site name to the metric in which its error counts.
        batches: Arguments of runs, on which the moments of the compressed network are matched with the original's.
        norm_statistics: Name of a batch-norm buffer to its value on the synthetic images. Where these are all there
            is, the original that is matched with normalizes by them.
        held_back: Arguments of runs that no statistic has seen, to measure the quality of the compressed network on.
        synthetic: Whether what was held back was generated.
        seen: Images of the user's, without a batch axis, that statistics have seen: all, or a random sample of them.
    """

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    batches: tuple[Inputs, ...] = ()
    norm_statistics: Mapping[str, Tensor] = field(default_factory=dict)
    held_back: tuple[Inputs, ...] = ()
    synthetic: bool = False
    seen: tuple[Tensor, ...] = ()

    @property
    def images_held_back(self) -> int:
        """The number of images that were held back; 0 for a model that does not take one tensor of them."""
        return sum(len(batch.only_tensor) for batch in self.held_back if batch.only_tensor is not None)


def match_example(
    model: nn.Module, example_inputs: ExampleInputs | None, calibration: Calibration
) -> tuple[Inputs, Calibration]:
    """Return the example input, which has the size of the calibration images where none is given.

    Flops depend on the size of the images, so a budget that is met at one size may be exceeded at another.

    Args:
        model: Any module.
        example_inputs: What the user gave.
        calibration: What the user gave.

    Returns:
        The example input, and the calibration to use in place of the given one, of which the first batch is taken.

    Raises:
        DiscoveryError: Neither an example input nor calibration images are given, and nothing is known of the model.

    Warns:
        UserWarning: When an example input and images of another size are given.
    """
    if calibration is None or isinstance(calibration, str):
        return resolve_inputs(model, example_inputs), calibration
    size, calibration = first_image_size(calibration)
    if size is None:
        return resolve_inputs(model, example_inputs), calibration
    try:
        inputs = resolve_inputs(model, example_inputs)
    except DiscoveryError:  # the images are all that is known of the input
        return image_of_size(model, size), calibration
    example = inputs.only_tensor
    if example is None or example.ndim != 1 + len(size) or tuple(example.shape[2:]) == size[1:]:
        return inputs, calibration
    if example_inputs is None:
        return image_of_size(model, (example.shape[1], *size[1:])), calibration
    warn_user(
        f"flops are counted on the example input of {_pixels(tuple(example.shape))} pixels, and the calibration images "
        f"have {_pixels(size)}: on images of that size the budget may be exceeded. Pass example_inputs= of their size."
    )
    return inputs, calibration


def _pixels(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape[-2:]))


def calibration_label(calibration: Calibration, inputs: Inputs) -> str:
    """Return what a plan says of its calibration, one of the four texts of `Plan.calibration`."""
    if calibration is None:
        return "weights only"
    if not isinstance(calibration, str):
        return "images"
    return "synthetic noise" if falls_back_to_noise(inputs) else "synthetic"


def measure(
    model: nn.Module,
    sites: Sequence[ConvSite],
    calibration: Calibration,
    inputs: Inputs,
    *,
    agreement: float | None = None,
) -> Measurements:
    """Measure the sites of a model on the user's images or on synthetic ones.

    Args:
        model: Any module; it is the same afterwards.
        sites: The sites that can be replaced.
        calibration: Images, "synthetic", or None.
        inputs: The example input.
        agreement: The agreement that is asked for; half of the images are held back then, if so many are needed.

    Raises:
        CalibrationError: As `statistics` and `image_batches`.
        BudgetError: When the agreement needs more images than are held back at most.

    Warns:
        UserWarning: When the images do not look like those that the network was trained on; see `ImageCheck`.
    """
    if calibration is None or not sites:
        return Measurements()
    held_back = _HeldBack.to_show(agreement)
    synthetic = Reservoir(synthetic_batches(model, inputs), most=_SAMPLE)
    if isinstance(calibration, str):
        metrics, norm_statistics = _measure_synthetic(model, sites, synthetic, draws=SYNTHETIC_DRAWS)
        unseen = synthetic_batches(model, inputs, seed=_SYNTHETIC_SEED, batches=math.ceil(held_back.synthetic / BATCH))
        return Measurements(metrics, tuple(synthetic.sample), norm_statistics, tuple(unseen), synthetic=True)
    checked = ImageCheck(model, image_batches(calibration, inputs), inputs)
    singles = (image for batch in checked for image in batch.tensors()[0])
    passed = HoldsBack(singles, every=held_back.every, most=held_back.most)
    most = max(BATCH, _MOST_BYTES // max(1, cast("Tensor", inputs.only_tensor)[0].nbytes))
    seen = Reservoir(passed, most=most, keep=lambda image: image.cpu().clone())  # an image holds its batch
    images = Reservoir(track(batched(seen, inputs), "calibrating"), most=_SAMPLE)
    metrics = statistics(model, sites, images)
    # A few images are not all that the network will see, so synthetic ones count as well; noise tells nothing of them.
    if not falls_back_to_noise(inputs):
        metrics = average_metrics(metrics, _measure_synthetic(model, sites, synthetic, draws=1)[0])
    held = tuple(batched(passed.held, inputs))
    return Measurements(metrics, tuple(images.sample), held_back=held, seen=tuple(seen.sample))


def _measure_synthetic(
    model: nn.Module, sites: Sequence[ConvSite], synthetic: Reservoir[Inputs], *, draws: int
) -> tuple[dict[str, Metric], dict[str, Tensor]]:
    """Return the metrics of a copy whose batch-norms hold statistics of synthetic images, and these statistics."""
    batches = list(synthetic)
    adapted = renormalize(model, batches)
    metrics = statistics(adapted, sites, track(batches, "calibrating, synthetic images"), draws=draws)
    return metrics, running_statistics(adapted)
