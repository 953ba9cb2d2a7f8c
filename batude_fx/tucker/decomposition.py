"""Tensor algebra of Tucker-2: unfoldings, mode products, HOSVD and HOOI. Uses neither torch.nn nor torch.fx.

Tucker-2 decomposes a convolution's weight over its two channel modes and leaves the spatial modes alone:
`weight ~ core x_0 factor_out x_1 factor_in`.

Every weight here is in *canonical* form (groups, C_out, C_in, k...), one weight per group, whatever the layout
of the module that owns it. All groups are decomposed in one batched call, which tensorly's `partial_tucker` does not
do; a test compares the results of both, and `benchmarks/tucker_time.py` their times.

Source: Y.-D. Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", ICLR 2016, https://arxiv.org/abs/1511.06530, section 3; L. De Lathauwer, B. De Moor, J. Vandewalle,
"A Multilinear Singular Value Decomposition", SIAM J. Matrix Anal. Appl. 21(4), 2000.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The parts of one decomposed site, batched over its groups.

    Attributes:
        factor_in: (groups, C_in, r_in), or None where mode 1 keeps its full rank.
        core: (groups, r_out, r_in, k...), or None at a pointwise site, where `weight ~ factor_out factor_in^T`.
        factor_out: (groups, C_out, r_out), or None where mode 0 keeps its full rank.
        bias: (groups * C_out,), or None.
    """

    factor_in: Tensor | None
    core: Tensor | None
    factor_out: Tensor | None
    bias: Tensor | None


def unfold(weight: Tensor, mode: int) -> Tensor:
    """Return the mode-0 (output channels) or mode-1 (input channels) unfolding of every group's weight.

    Args:
        weight: (groups, C_out, C_in, k...).
        mode: 0 or 1, counted without the group axis, as tensorly counts.

    Returns:
        (groups, C_out, C_in * K) or (groups, C_in, C_out * K).
    """
    return weight.movedim(mode + 1, 1).flatten(2)


def mode_product(weight: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply a channel mode of every group's weight by a matrix.

    Args:
        weight: (groups, C_out, C_in, k...).
        matrix: (groups, rows, C_mode).
        mode: 0 or 1.

    Returns:
        The weight with `rows` channels along that mode.
    """
    moved = weight.movedim(mode + 1, 1)
    product = matrix @ moved.flatten(2)  # (groups, rows, C_other * K)
    return product.view(*product.shape[:2], *moved.shape[2:]).movedim(1, mode + 1)


def leading_modes(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of symmetric positive semi-definite matrices, the largest first.

    Args:
        gram: (groups, n, n).

    Returns:
        Values (groups, n), where negative rounding errors are set to 0, and orthonormal columns (groups, n, n).
    """
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def mode_spectrum(weight: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Return squared singular values and left singular vectors of an unfolding, the largest first.

    They are the eigenvalues and eigenvectors of the unfolding times its transpose.

    Args:
        weight: (groups, C_out, C_in, k...).
        mode: 0 or 1.

    Returns:
        Squared values (groups, C_mode), and vectors as columns (groups, C_mode, C_mode).
    """
    flat = unfold(weight, mode)
    return leading_modes(flat @ flat.mT)


def hosvd(weight: Tensor, rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the truncated higher-order SVD over the two channel modes.

    Returns:
        Core (groups, rank_out, rank_in, k...), factor_out (groups, C_out, rank_out), factor_in (groups, C_in, rank_in);
        both factors orthonormal.
    """
    factor_out = mode_spectrum(weight, 0)[1][..., :rank_out]
    factor_in = mode_spectrum(weight, 1)[1][..., :rank_in]
    return _core(weight, factor_out, factor_in), factor_out, factor_in


def hooi(weight: Tensor, rank_out: int, rank_in: int, *, sweeps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Refine the HOSVD by higher-order orthogonal iteration, towards a local optimum of the approximation error.

    Each half step fixes one factor, projects the weight onto it, and takes the leading singular vectors of the other
    mode. So |core| never decreases, and the squared error, |weight|^2 - |core|^2, never grows.

    Returns:
        The same parts as `hosvd`.
    """
    _, factor_out, factor_in = hosvd(weight, rank_out, rank_in)
    for _ in range(sweeps):
        factor_out = mode_spectrum(mode_product(weight, factor_in.mT, 1), 0)[1][..., :rank_out]
        factor_in = mode_spectrum(mode_product(weight, factor_out.mT, 0), 1)[1][..., :rank_in]
    return _core(weight, factor_out, factor_in), factor_out, factor_in


def _core(weight: Tensor, factor_out: Tensor, factor_in: Tensor) -> Tensor:
    return mode_product(mode_product(weight, factor_out.mT, 0), factor_in.mT, 1)
