"""What each site loses at each rank, and its factors at the ranks it gets.

One mechanism serves both levels. A loss in a channel mode of a site is weighed by a *metric*: how much the channels
vary together (`covariance`), and how much the network's output moves with them (`sensitivity`). The directions of a
mode are the eigenvectors of one in the basis of the other, and their eigenvalues are what cutting them costs. Without
calibration the weight's own unfoldings decide, which is its HOSVD.

Source: the metric is the Kronecker-factored approximation of the output's Gauss-Newton matrix: R. Grosse, J. Martens,
"A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016, https://arxiv.org/abs/1602.01407.
The weights-only loss is the bound of De Lathauwer et al. 2000, property 10.
"""

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from batude_fx.support.arrays import Floats
from batude_fx.tucker.decomposition import Factors, leading_modes, mode_product, mode_spectrum
from batude_fx.tucker.ranks import Ranks, SiteLoss

# Relative to the mean eigenvalue. Directions that the calibration images do not use must not count as free: users have
# other images. On held-out photos 1e-3 to 1e-1 did alike.
DAMPING = 1e-2
_DEAD = 1e-6  # of the group that is most alive: what one counts that no image wakes


@dataclass(frozen=True)
class ModeMetric:
    """How errors in one channel mode of a site are weighed.

    Attributes:
        covariance: (groups, C, C) centred covariance of the channels: how much there is to lose in a direction.
        sensitivity: (groups, C, C) second moment of the gradient of the network's output with respect to the channels,
            summed over positions, per image: how much a loss in a direction matters.
    """

    covariance: Tensor
    sensitivity: Tensor

    def total(self) -> float:
        """What the network would lose if this mode lost everything."""
        return float((self.covariance * self.sensitivity).sum())


@dataclass(frozen=True)
class Metric:
    """How errors at one site are weighed; made by `measuring`.

    Attributes:
        out: Of the output channels; None at a pointwise site that has fewer input channels.
        in_: Of the input channels; None at other pointwise sites.
    """

    out: ModeMetric | None
    in_: ModeMetric | None


@dataclass(frozen=True)
class Modes:
    """Directions of one channel mode, from the one whose loss would hurt most to the one that hurts least.

    Attributes:
        energy: (groups, C) what cutting each direction costs.
        encode: (groups, C, C) row i gives the coordinate along direction i.
        decode: (groups, C, C) column i is direction i; `decode @ encode` is the identity.
    """

    energy: Tensor
    encode: Tensor
    decode: Tensor

    def tail(self) -> Floats:
        """(C + 1,) half of the energy cut off when r directions remain, r = 0 ... C, all groups together."""
        energy = self.energy.sum(0).cpu().double().numpy()
        return np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]]) / 2


@dataclass(frozen=True)
class Spectrum:
    """The decomposition of one site at all ranks at once.

    Attributes:
        out: Directions of the output channels; at a pointwise site None unless it is the smaller mode.
        in_: Directions of the input channels; at a pointwise site None unless it is the smaller mode.
    """

    out: Modes | None
    in_: Modes | None

    def loss(self) -> SiteLoss:
        """The loss of every rank of both modes."""
        if self.out is not None and self.in_ is not None:
            return SiteLoss(out=self.out.tail(), in_=self.in_.tail())
        only = (self.out or cast("Modes", self.in_)).tail()
        return SiteLoss(out=only, in_=np.zeros_like(only))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that it was made from."""
        return cast("Modes", self.out or self.in_).energy.dtype

    @property
    def device(self) -> torch.device:
        """Likewise."""
        return cast("Modes", self.out or self.in_).energy.device

    def factors(self, weight: Tensor, ranks: Ranks) -> Factors:
        """Factors of the weight at some ranks.

        Args:
            weight: (groups, C_out, C_in, k...), the one that the spectrum was made from.
            ranks: Per group; a full rank gives no factor.

        Returns:
            Factors without a bias, in the weight's dtype.
        """
        if self.out is None or self.in_ is None:
            return self._pair(weight.flatten(2), ranks.rank_out)
        core, factor_out, factor_in = weight, None, None
        if ranks.rank_out < weight.shape[1]:
            core = mode_product(core, self.out.encode[:, : ranks.rank_out], 0)
            factor_out = self.out.decode[..., : ranks.rank_out]
        if ranks.rank_in < weight.shape[2]:
            core = mode_product(core, self.in_.decode[..., : ranks.rank_in].mT, 1)
            factor_in = self.in_.encode[:, : ranks.rank_in].mT
        return _evened(Factors(factor_in, core, factor_out, bias=None))

    def _pair(self, weight: Tensor, rank: int) -> Factors:
        if self.out is not None:
            factor_out = self.out.decode[..., :rank]
            factor_in = (self.out.encode[:, :rank] @ weight).mT
        else:
            modes = cast("Modes", self.in_)
            factor_out = weight @ modes.decode[..., :rank]
            factor_in = modes.encode[:, :rank].mT
        return _evened(Factors(factor_in, None, factor_out, bias=None))


def _evened(factors: Factors) -> Factors:
    """The same product of parts of equal norms, in each group: a metric can put all of the scale into one of them.

    In training, gradients of a part are as large as the others are, so that a large one would starve.
    """
    parts = {name: part for name, part in vars(factors).items() if part is not None}
    if len(parts) < 2:  # noqa: PLR2004
        return factors
    norms = {name: part.flatten(1).norm(dim=1) for name, part in parts.items()}  # (groups,)
    mean = torch.stack(list(norms.values())).log().mean(0).exp()
    scaled = (mean > 0) & mean.isfinite()  # weights of zeros have no scale
    gains = {name: torch.where(scaled, mean / norm, 1) for name, norm in norms.items()}
    return replace(
        factors, **{name: part * gains[name].view(-1, *[1] * (part.ndim - 1)) for name, part in parts.items()}
    )


def weight_spectrum(weight: Tensor, *, pointwise: bool) -> Spectrum:
    """The spectrum from the weight alone: squared singular values of the unfoldings, relative to the weight's energy.

    Args:
        weight: (groups, C_out, C_in, k...).
        pointwise: Whether all k are 1.
    """
    _, c_out, c_in, *_ = weight.shape
    energy = weight.square().sum().clamp_min(torch.finfo(weight.dtype).tiny)

    def modes(mode: int) -> Modes:
        values, vectors = mode_spectrum(weight, mode)
        return Modes(energy=2 * values / energy, encode=vectors.mT, decode=vectors)

    if pointwise:
        return Spectrum(out=modes(0), in_=None) if c_out <= c_in else Spectrum(out=None, in_=modes(1))
    return Spectrum(out=modes(0), in_=modes(1))


def metric_spectrum(metric: Metric) -> Spectrum:
    """The spectrum in the metric of a site: what the network's output loses, second order, per image."""
    out, in_ = metric.out, metric.in_
    return Spectrum(
        # Outputs are encoded by what matters, and decoded back.
        out=None if out is None else _modes(out.covariance, out.sensitivity, encode_weighed=True),
        # Inputs are encoded by whitening, and the weight absorbs the root of their covariance.
        in_=None if in_ is None else _modes(in_.sensitivity, in_.covariance, encode_weighed=False),
    )


def _modes(gram: Tensor, moment: Tensor, *, encode_weighed: bool) -> Modes:
    """Eigenvectors V of `root.T gram root`, where `moment = root root.T`: coordinates `root V` and `root.T^-1 V`."""
    root = torch.linalg.cholesky(_damped(moment))
    values, vectors = leading_modes(root.mT @ gram @ root)
    weighed, back = root @ vectors, torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    encode, decode = (weighed, back) if encode_weighed else (back, weighed)
    return Modes(energy=values, encode=encode.mT, decode=decode)


def _damped(moment: Tensor) -> Tensor:
    """(groups, n, n), positive definite."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)  # (groups,)
    most = mean.max()
    damping = DAMPING * mean.maximum(torch.where(most > 0, _DEAD * most, 1))[:, None, None]
    return moment + damping * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
