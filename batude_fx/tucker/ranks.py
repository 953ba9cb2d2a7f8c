"""The Tucker-2 ranks of a site, and the loss of the site at each rank."""

from dataclasses import dataclass

from batude_fx.support.arrays import Floats


@dataclass(frozen=True)
class Ranks:
    """Tucker-2 ranks of one site, *per group*.

    Attributes:
        rank_out: Rank of mode 0, the output channels; at `out_channels // groups` there is no `factor_out`.
        rank_in: Rank of mode 1, the input channels; at `in_channels // groups` there is no `factor_in`.
            At a pointwise site both ranks are equal and there is no core.
    """

    rank_out: int
    rank_in: int


@dataclass(frozen=True)
class SiteLoss:
    """The loss of one site at each rank; the loss of a pair of ranks is the sum over both modes.

    Attributes:
        out: (c_out + 1,) loss of keeping r directions of mode 0, r = 0 ... c_out, with c_out per group; the last is 0.
        in_: (c_in + 1,) loss of keeping r directions of mode 1; zeros of the shape of `out` at a pointwise site, whose
            single rank has its whole loss in `out`.
    """

    out: Floats
    in_: Floats
