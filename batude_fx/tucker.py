"""Tensor mathematics of Tucker-2: unfoldings, mode products, HOSVD and HOOI. No `nn`, no fx.

Tucker-2 decomposes a convolution's weight over its two channel modes and leaves the spatial modes alone:
`weight ~ core x_0 factor_out x_1 factor_in`.

Every weight here is in *canonical* form (groups, C_out, C_in, k...), one weight per group, whatever the layout
of the module that owns it.

Source: Y.-D. Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", ICLR 2016, https://arxiv.org/abs/1511.06530, section 3.
"""

from dataclasses import dataclass

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
