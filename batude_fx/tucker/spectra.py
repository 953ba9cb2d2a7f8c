"""The spectrum of a site: what cutting each direction of its channels costs, and the factors at any ranks.

With calibration, an error in the channels of a site is weighed by how much it changes the output of the network; see
`ModeMetric` for the formula, `_output_modes` and `_input_modes` for the directions that follow from it. Without
calibration the singular values of the weight's own unfoldings decide, which gives the truncated HOSVD.

Source: the metric is the Kronecker-factored approximation of the Gauss-Newton matrix: R. Grosse, J. Martens, "A
Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016, https://arxiv.org/abs/1602.01407. The
loss without calibration is the error bound of the truncated HOSVD: De Lathauwer et al. 2000, property 10.
"""

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from batude_fx.support.arrays import Floats
from batude_fx.tucker.decomposition import Factors, leading_modes, mode_product, mode_spectrum
from batude_fx.tucker.metric import Metric, ModeMetric, damp
from batude_fx.tucker.ranks import Ranks, SiteLoss


@dataclass(frozen=True)
class ModeDirections:
    """A basis of one channel mode, from the direction that costs most to cut to the one that costs least.

    Keeping the first r directions replaces channels x by `decode[..., :r] @ encode[:, :r] @ x`.

    Attributes:
        energy: (groups, C) twice the loss of cutting each direction.
        encode: (groups, C, C) row i maps channels to their coordinate along direction i.
        decode: (groups, C, C) column i is direction i; `decode @ encode` is the identity.
    """

    energy: Tensor
    encode: Tensor
    decode: Tensor

    def loss_by_rank(self) -> Floats:
        """Return (C + 1,) half of the energy that is cut when r directions remain, r = 0 ... C, summed over groups."""
        energy = self.energy.sum(0).cpu().double().numpy()
        return np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]]) / 2


@dataclass(frozen=True)
class Spectrum:
    """The decomposition of one site at all ranks at once.

    Attributes:
        out: Directions of the output channels; None at a pointwise site that has fewer input channels.
        in_: Directions of the input channels; None at all other pointwise sites.
    """

    out: ModeDirections | None
    in_: ModeDirections | None

    def loss(self) -> SiteLoss:
        """Return the loss of every rank of both modes."""
        if self.out is not None and self.in_ is not None:
            return SiteLoss(out=self.out.loss_by_rank(), in_=self.in_.loss_by_rank())
        losses = self._any_mode.loss_by_rank()
        return SiteLoss(out=losses, in_=np.zeros_like(losses))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the directions, which is that of the weight."""
        return self._any_mode.energy.dtype

    @property
    def device(self) -> torch.device:
        """The device of the directions."""
        return self._any_mode.energy.device

    @property
    def _any_mode(self) -> ModeDirections:
        return cast("ModeDirections", self.out or self.in_)

    def factors(self, weight: Tensor, ranks: Ranks) -> Factors:
        """Return the factors of a weight at the given ranks.

        Keeping r output directions turns the weight W into D_r E_r W: E_r W is the core and D_r the output factor. On
        the input side it turns W into W D_r E_r: there D_r goes into the core, and E_r is the input factor.

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
        return _with_equal_norms(Factors(factor_in, core, factor_out, bias=None))

    def _pair(self, weight: Tensor, rank: int) -> Factors:
        """Return the two factors of a pointwise weight (groups, C_out, C_in), which has no core."""
        if self.out is not None:
            factor_out = self.out.decode[..., :rank]
            factor_in = (self.out.encode[:, :rank] @ weight).mT
        else:
            directions = self._any_mode
            factor_out = weight @ directions.decode[..., :rank]
            factor_in = directions.encode[:, :rank].mT
        return _with_equal_norms(Factors(factor_in, None, factor_out, bias=None))


def _with_equal_norms(factors: Factors) -> Factors:
    """Scale the parts of each group to equal norms; their product stays the same.

    A metric can put all of the scale into one part. In training, the gradient of a part is as large as the other parts
    are, so that a part that is much larger than the others would hardly move.
    """
    parts = {name: part for name, part in vars(factors).items() if part is not None}
    if len(parts) < 2:  # noqa: PLR2004
        return factors
    norms = {name: part.flatten(1).norm(dim=1) for name, part in parts.items()}  # (groups,)
    mean = torch.stack(list(norms.values())).log().mean(0).exp()  # geometric, so that the gains multiply to 1
    scalable = (mean > 0) & mean.isfinite()  # a weight of zeros has no scale
    gains = {name: torch.where(scalable, mean / norm, 1) for name, norm in norms.items()}
    return replace(
        factors, **{name: part * gains[name].view(-1, *[1] * (part.ndim - 1)) for name, part in parts.items()}
    )


def weight_spectrum(weight: Tensor, *, pointwise: bool) -> Spectrum:
    """Return the spectrum of the weight alone; losses are cut squared singular values, relative to |weight|^2.

    Args:
        weight: (groups, C_out, C_in, k...).
        pointwise: Whether all k are 1.
    """
    _, c_out, c_in, *_ = weight.shape
    weight_energy = weight.square().sum().clamp_min(torch.finfo(weight.dtype).tiny)

    def directions(mode: int) -> ModeDirections:
        values, vectors = mode_spectrum(weight, mode)
        return ModeDirections(energy=2 * values / weight_energy, encode=vectors.mT, decode=vectors)

    if pointwise:
        return Spectrum(directions(0), None) if c_out <= c_in else Spectrum(None, directions(1))
    return Spectrum(directions(0), directions(1))


def metric_spectrum(metric: Metric) -> Spectrum:
    """Return the spectrum in the metric of a site; losses are those of the network's output, per image."""
    return Spectrum(
        out=None if metric.out is None else _output_modes(metric.out),
        in_=None if metric.in_ is None else _input_modes(metric.in_),
    )


def _output_modes(metric: ModeMetric) -> ModeDirections:
    """Return the principal components of the outputs, after a change of basis in which all errors matter alike.

    Let S be the covariance and H = L L^T the sensitivity with its Cholesky root. An error e costs e^T H e = |L^T e|^2,
    so in the coordinates L^T y the cost is the squared length. Their covariance is L^T S L = V diag(energy) V^T, and
    PCA is optimal there: z = V^T L^T y has uncorrelated coordinates, and cutting coordinate i costs its variance,
    energy_i. Hence encode = V^T L^T, and decode = L^-T V is its inverse because V is orthogonal. The energies sum to
    trace(S H), the cost of cutting everything.
    """
    root = torch.linalg.cholesky(damp(metric.sensitivity))
    energy, vectors = leading_modes(root.mT @ metric.covariance @ root)
    encode = (root @ vectors).mT
    decode = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    return ModeDirections(energy, encode, decode)


def _input_modes(metric: ModeMetric) -> ModeDirections:
    """Return whitened coordinates of the inputs, rotated so that their costs add up.

    Let S = L L^T be the covariance with its Cholesky root, and H the sensitivity. The coordinates L^-1 x are white:
    their covariance is the identity. In them the sensitivity is L^T H L = V diag(energy) V^T. So z = V^T L^-1 x is
    still white, its coordinates do not interact in the cost, and cutting coordinate i costs energy_i times its
    variance, which is 1. Hence encode = V^T L^-1, and decode = L V is its inverse, which the weight absorbs.

    Without damping, `_output_modes` would find the same directions, the eigenvectors of S H. Damping is added to the
    matrix that is factored: to the covariance here, so that inputs which the calibration images lack are not free to
    cut; to the sensitivity there, for outputs that the network ignored on these images.
    """
    root = torch.linalg.cholesky(damp(metric.covariance))
    energy, vectors = leading_modes(root.mT @ metric.sensitivity @ root)
    encode = torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT
    decode = root @ vectors
    return ModeDirections(energy, encode, decode)
