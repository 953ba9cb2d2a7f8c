"""The figures that say how close a network's outputs are to its original's.

The agreement of the top class on images that the original itself is unsure of is a coin toss. So a classifier is judged
by the mean KL divergence of its class probabilities, by the agreement on all images, and by that on the images where
the original is sure, each with its 95 % interval; any other network by the relative error of each of its outputs.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from batude_fx.support.numbers import wilson_interval

SURE_MARGIN = 0.2
"""An original is sure of an image if its first class has at least this much more probability than its second."""
LOW_AGREEMENT = 0.8
"""Agreement under which a user is warned."""
HIGH_DIVERGENCE = 0.15
"""Mean KL divergence on generated images over which a user is warned. Agreement says little there: of seven networks
over it, three agreed with their originals on 0.94 of the generated images, but on 0.71, 0.69 and 0.41 of photos."""
_LARGE_ERROR = 0.5
_ENOUGH_IMAGES = 32  # to warn of an agreement whose interval does not lie below the limit as a whole
_Z = 1.959964  # standard errors on each side of a mean, for 95 %
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Share(_Frozen):
    """A share of some images.

    Attributes:
        hits: Number of images that count.
        images: Number of all images, at least one.
    """

    hits: Count
    images: Annotated[Count, Field(ge=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hits > self.images:
            raise ValueError(f"{self.hits} of {self.images} images is no share")
        return self

    @property
    def value(self) -> float:
        """The share, from 0 to 1."""
        return self.hits / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval by Wilson, in which the share on all images of this kind lies."""
        return wilson_interval(self.hits, self.images)

    def __str__(self) -> str:
        """Return the share with its interval: "93.8 % (86 to 97)"."""
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


class Divergence(_Frozen):
    """The mean KL divergence of class probabilities from the original's, in nats.

    Attributes:
        mean: Mean over the images.
        standard_error: Standard deviation of one image's, divided by the root of their number, of which there are two.
    """

    mean: float
    standard_error: Annotated[float, Field(ge=0)]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean, by the normal distribution."""
        width = _Z * self.standard_error
        return max(0.0, self.mean - width), self.mean + width

    def __str__(self) -> str:
        """Return the mean with its interval: "0.061 (0.04 to 0.082)"."""
        low, high = self.interval
        return f"{self.mean:.2g} ({low:.2g} to {high:.2g})"


class OutputError(_Frozen):
    """How far one output tensor is from the original's, over all images.

    Attributes:
        name: Where the tensor is among the outputs, such as "0.boxes"; "output" for a single one.
        problem: Why there are no figures: the two networks give tensors of other shapes, as a detector that finds other
            boxes does; a value is not finite; or the original gives nothing but zeros.
        relative_error: Sum of the squared differences, divided by that of the squared outputs.
        r_squared: Share of the output's variance that is explained; None where the output does not vary.
        psnr: Peak signal-to-noise ratio in decibels, for an output of the size of the input image; else None.
        equal: Share of the values that are the same, for integers and truth values; else None.
    """

    name: str
    problem: Literal["other shapes", "not finite", "zero in the original"] | None = None
    relative_error: Annotated[float, Field(ge=0)] | None = None
    r_squared: float | None = None
    psnr: float | None = None
    equal: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def is_large(self) -> bool:
        """Whether more than half of the output is error, or a value is not finite."""
        return self.problem == "not finite" or (self.relative_error or 0.0) > _LARGE_ERROR

    def __str__(self) -> str:
        """Return the figures: "out: relative error 0.013, R squared 0.98"."""
        if self.problem:
            return f"{self.name}: {self.problem}"
        if self.equal is not None:
            return f"{self.name}: {100 * self.equal:.1f} % of the values equal"
        parts = [f"relative error {self.relative_error:.2g}"]
        parts += [f"R squared {self.r_squared:.3g}"] if self.r_squared is not None else []
        parts += [f"PSNR {self.psnr:.1f} dB"] if self.psnr is not None else []
        return f"{self.name}: {', '.join(parts)}"


class Quality(_Frozen):
    """How close a network's outputs are to its original's, on images that it was not fitted to.

    One output (N, classes) counts as the scores or probabilities of a classifier.

    Attributes:
        images: Number of images.
        synthetic: Whether the images were generated, so that photos may give other figures.
        divergence: Mean KL divergence, of a classifier whose outputs are finite.
        agreement: Share of the images with the original's top class, of a classifier.
        sure_agreement: The same of the images of which the original is sure; None where it is sure of none.
        outputs: The error of each output tensor, of any other network.

    Source of the divergence: S. Kullback, R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical
    Statistics 22, 1951.
    """

    images: Annotated[Count, Field(ge=1)]
    synthetic: bool
    divergence: Divergence | None = None
    agreement: Share | None = None
    sure_agreement: Share | None = None
    outputs: Annotated[tuple[OutputError, ...], Field(max_length=1000)] = ()

    @property
    def is_low(self) -> bool:
        """Whether a classifier disagrees too often, or would on photos as it diverges; or another output is wrong."""
        if self.agreement is None:
            return any(output.is_large for output in self.outputs)
        shown = self.images >= _ENOUGH_IMAGES or self.agreement.interval[1] < LOW_AGREEMENT
        diverges = self.divergence is None or self.divergence.mean > HIGH_DIVERGENCE
        return (self.agreement.value < LOW_AGREEMENT and shown) or (self.synthetic and diverges)

    @property
    def distance(self) -> float | None:
        """How far the network is from its original: the divergence, or the mean relative error; None if unknown."""
        if self.agreement is not None:
            return self.divergence.mean if self.divergence else None
        errors = [output.relative_error for output in self.outputs if output.relative_error is not None]
        is_known = errors and not any(output.problem == "not finite" for output in self.outputs)
        return math.fsum(errors) / len(errors) if is_known else None

    @property
    def short(self) -> str:
        """The most important figures as the end of a sentence."""
        if self.agreement is None:
            return f"had {'; '.join(map(str, self.outputs))}"
        divergence = f" and diverged by {self.divergence} nats" if self.divergence else ""
        return f"agreed on {self.agreement}{divergence}"

    @property
    def where(self) -> str:
        """What the figures were measured on."""
        return f"{self.images} {'generated images' if self.synthetic else 'images'} held back"

    def __str__(self) -> str:
        """Return the figures as the end of a sentence that begins with the network, without a full stop."""
        if self.agreement is None:
            return f"differs from the original on {self.where}: {'; '.join(map(str, self.outputs))}"
        parts = [f"agrees with the original on {self.agreement} of {self.where}"]
        if sure := self.sure_agreement:
            parts.append(f"on {sure} of the {sure.images} that it is sure of (margin {SURE_MARGIN})")
        else:
            parts.append(f"it is sure of none (margin {SURE_MARGIN})")
        if self.divergence:
            parts.append(f"mean KL divergence {self.divergence} nats")
        return f"{'; '.join(parts)}; 95 % intervals in brackets"


class Restoration(_Frozen):
    """How a network was taught by its original after it was compressed.

    Attributes:
        before: How close it was to its original before.
        images: Number of images that it was taught with.
        steps: Number of steps that were done.
        kept: Number of steps after which it was as it is now; 0 if no step brought it closer to its original.
    """

    before: Quality
    images: Annotated[Count, Field(ge=1)]
    steps: Count
    kept: Count

    def __str__(self) -> str:
        """Return a sentence that begins with the network, without a full stop."""
        if not self.kept:
            return f"could not be brought closer to its original by {self.steps} steps, so it stays as it was"
        return f"was restored in {self.kept} of {self.steps} steps; before, it {self.before.short}"


class Trial(_Frozen):
    """A network that a search for the smallest one of a quality has tried.

    Attributes:
        flops: Multiply-adds of the network.
        value: What was measured.
        bound: What counts: the lower end of the interval of an agreement, the value itself of a score.
    """

    flops: Count
    value: float
    bound: float


class Search(_Frozen):
    """How the smallest network of a quality was found.

    Attributes:
        target: What was asked for: "agreement", "score" or "max_drop".
        least: The bound that a network must reach.
        trials: The networks that were tried, in this order.
    """

    target: str
    least: float
    trials: Annotated[tuple[Trial, ...], Field(max_length=100)]

    def __str__(self) -> str:
        """Return the end of a sentence: "found in 8 trials"."""
        return f"found in {len(self.trials)} trial{'s' if len(self.trials) > 1 else ''}"


def divergence_of(divergences: "list[float]") -> Divergence | None:
    """Return the mean of the divergences of all images; None where one is not finite, or there are fewer than two."""
    if len(divergences) < 2 or not all(map(math.isfinite, divergences)):  # noqa: PLR2004 - one has no deviation
        return None
    mean = math.fsum(divergences) / len(divergences)
    squares = math.fsum((value - mean) ** 2 for value in divergences)
    variance = squares / (len(divergences) - 1)
    return Divergence(mean=mean, standard_error=math.sqrt(variance / len(divergences)))
