"""The two frozen types that travel through the rooms: a convolution that could be replaced, and the ranks it gets."""

from dataclasses import dataclass

from batude_fx.support.arrays import Floats


@dataclass(frozen=True)
class Ranks:
    """Tucker-2 ranks of one site, *per group*.

    Attributes:
        rank_out: Rank of mode 0, the output channels; equal to `out_channels // groups` drops `factor_out`.
        rank_in: Rank of mode 1, the input channels; equal to `in_channels // groups` drops `factor_in`.
            At a pointwise site both ranks are equal and there is no core.
    """

    rank_out: int
    rank_in: int


@dataclass(frozen=True)
class SiteLoss:
    """What one site would lose at each rank; the loss of a rank pair is the sum over both modes.

    Attributes:
        out: (c_out + 1,) loss of keeping r directions of mode 0, r = 0 ... c_out, with c_out per group; the last is 0.
        in_: (c_in + 1,) likewise for mode 1; zeros at a pointwise site, whose one rank `out` already judges.
    """

    out: Floats
    in_: Floats
