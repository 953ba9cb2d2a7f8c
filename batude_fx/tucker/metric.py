"""The metric of a site: how much an error in its channels changes the output of the network, and its damping.

`calibration.statistics` measures metrics, `spectra` derives from them the directions that channels are cut along.

Source: the Kronecker-factored approximation of the Gauss-Newton matrix: R. Grosse, J. Martens, "A Kronecker-factored
approximate Fisher matrix for convolution layers", ICML 2016, https://arxiv.org/abs/1602.01407.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Added to the matrix that is factored, relative to its mean eigenvalue: a direction that the calibration images do not
# use must not be free to cut, as other images may use it. On held-out photos, 1e-3 to 1e-1 did equally well.
DAMPING = 1e-2
_LEAST_MEAN = 1e-6  # the mean eigenvalue that a group is given at least, relative to the largest group mean


@dataclass(frozen=True)
class ModeMetric:
    """The weights of errors in one channel mode of a site.

    An error e_p in the channels at each position p changes the network's output by sum_p J_p e_p, where J_p is the
    Jacobian at p. The loss is half of the squared norm of that change, in the mean over images. K-FAC takes errors to
    be independent of Jacobians, and the Jacobians of different positions to be uncorrelated. Then the loss is
    trace(Cov(e) H) / 2 with H = sum_p mean(J_p^T J_p). For random r of unit covariance, the gradients g_p = J_p^T r of
    r^T output have the second moment J_p^T J_p, so that backward passes estimate H. Cutting all directions of the
    channels x, but not their mean, makes e = mean(x) - x, whose covariance is that of x.

    Attributes:
        covariance: (groups, C, C) covariance of the channels, the mean subtracted.
        sensitivity: (groups, C, C) the H above: the second moment of the gradients g_p, summed over positions, per
            image.
    """

    covariance: Tensor
    sensitivity: Tensor

    def total(self) -> float:
        """Return trace(covariance sensitivity), twice the loss of cutting all directions; all groups together."""
        return float((self.covariance * self.sensitivity).sum())  # the trace of a product, as both are symmetric


@dataclass(frozen=True)
class Metric:
    """The weights of errors at one site, as `calibration.statistics` measures them.

    Attributes:
        out: For the output channels; None at a pointwise site that has fewer input channels.
        in_: For the input channels; None at all other pointwise sites.
    """

    out: ModeMetric | None
    in_: ModeMetric | None


def damp(moment: Tensor) -> Tensor:
    """Return a second moment (groups, n, n) that is made positive definite by adding a multiple of the identity.

    A group whose moment is zero, as no image activates it, is damped relative to the largest of the groups instead.
    """
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)  # (groups,)
    largest = mean.max()
    damping = DAMPING * mean.maximum(torch.where(largest > 0, _LEAST_MEAN * largest, 1))[:, None, None]
    return moment + damping * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
