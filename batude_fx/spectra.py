"""What each site loses at each rank, and its factors at the ranks it gets.

One mechanism serves both levels. A site's error is measured in a *metric*: how much its input channels vary together
(`covariance_in`) and how much the network's output moves with its output channels (`sensitivity_out`). The weight is
decomposed in that metric, `root_out weight root_in`, and mapped back. Without calibration both are the identity, and
this is the HOSVD of the weight.

Source: the metric is the Kronecker-factored approximation of the output's Gauss-Newton matrix: R. Grosse, J. Martens,
"A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016, https://arxiv.org/abs/1602.01407.
The weights-only loss is the bound of De Lathauwer et al. 2000, property 10.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batude_fx.allocation import SiteLoss
from batude_fx.sites import ConvSite, Ranks
from batude_fx.tucker import Factors, leading_modes, mode_product, mode_spectrum

# Relative to the mean eigenvalue. Directions that the calibration images do not use must not count as free: users have
# other images. Chosen on held-out photos, see docs/calibration.md.
DAMPING = 1e-2


@dataclass(frozen=True)
class Metric:
    """How errors at one site are weighed.

    Attributes:
        covariance_in: (groups, C_in, C_in) centred covariance of the input channels.
        covariance_out: (groups, C_out, C_out) centred covariance of the output channels.
        sensitivity_out: (groups, C_out, C_out) second moment of the gradient of the network's output with respect to
            this site's output, summed over positions, per image; None where no gradient arrives.
    """

    covariance_in: Tensor
    covariance_out: Tensor
    sensitivity_out: Tensor | None


@dataclass(frozen=True)
class Spectrum:
    """The decomposition of one site at all ranks at once.

    Attributes:
        energy_out: (groups, C_out) loss that each direction of mode 0 stands for, the largest first.
        energy_in: (groups, C_in) likewise for mode 1. At a pointwise site only the smaller mode has one.
        encode_out: (groups, C_out, C_out) rows map an output to its coordinate along each direction of mode 0.
        decode_out: (groups, C_out, C_out) columns map the coordinates back.
        encode_in: (groups, C_in, C_in) rows map an input to its coordinate along each direction of mode 1.
        decode_in: (groups, C_in, C_in) columns map the coordinates back.
    """

    energy_out: Tensor | None
    energy_in: Tensor | None
    encode_out: Tensor | None
    decode_out: Tensor | None
    encode_in: Tensor | None
    decode_in: Tensor | None

    def loss(self, site: ConvSite) -> SiteLoss:
        """The loss of every rank of both modes: half of the energy that is cut off."""
        out, in_ = (None if energy is None else _tail(energy) for energy in (self.energy_out, self.energy_in))
        if site.is_pointwise:
            return SiteLoss(out=_defined(out, in_), in_=np.zeros_like(_defined(out, in_)))
        return SiteLoss(out=_defined(out, in_), in_=_defined(in_, out))

    def factors(self, weight: Tensor, ranks: Ranks) -> Factors:
        """Factors of the weight at some ranks.

        Args:
            weight: (groups, C_out, C_in, k...), the one that the spectrum was made from.
            ranks: Per group; a full rank gives no factor.

        Returns:
            Factors without a bias, in the weight's dtype.
        """
        wide = weight.to(_working_dtype(weight))
        _, c_out, c_in, *kernel = weight.shape
        if all(extent == 1 for extent in kernel):
            return self._pair(wide.flatten(2), ranks.rank_out, weight.dtype)
        core, factor_out, factor_in = wide, None, None
        if ranks.rank_out < c_out and self.encode_out is not None and self.decode_out is not None:
            core = mode_product(core, self.encode_out[:, : ranks.rank_out], 0)
            factor_out = self.decode_out[..., : ranks.rank_out].to(weight.dtype)
        if ranks.rank_in < c_in and self.encode_in is not None and self.decode_in is not None:
            core = mode_product(core, self.decode_in[..., : ranks.rank_in].mT, 1)
            factor_in = self.encode_in[:, : ranks.rank_in].mT.to(weight.dtype)
        return Factors(factor_in=factor_in, core=core.to(weight.dtype), factor_out=factor_out, bias=None)

    def _pair(self, weight: Tensor, rank: int, dtype: torch.dtype) -> Factors:
        if self.encode_out is not None and self.decode_out is not None:
            factor_out = self.decode_out[..., :rank]
            factor_in = (self.encode_out[:, :rank] @ weight).mT
        else:
            assert self.encode_in is not None and self.decode_in is not None  # noqa: S101, PT018 - for the type checker
            factor_out = weight @ self.decode_in[..., :rank]
            factor_in = self.encode_in[:, :rank].mT
        # Both parts get the same scale, or training and half precision suffer.
        scale = (factor_out.norm() / factor_in.norm()).sqrt()
        return Factors(
            factor_in=(factor_in * scale).to(dtype), core=None, factor_out=(factor_out / scale).to(dtype), bias=None
        )
