"""`ConvSite`: one convolution of a model, with what its cost depends on."""

from dataclasses import dataclass
from typing import Literal

FoundBy = Literal["fx", "leaf", "child", "tree"]


@dataclass(frozen=True)
class ConvSite:
    """One convolution (or linear layer) of a model, with the sizes that its cost depends on.

    Attributes:
        name: Qualified name of the module, the first one where a module is shared.
        kind: Name of the module's exact class, `"Conv2d"`, `"ScaledStdConv2d"`, `"Linear"`.
        in_channels: Input channels, all groups together.
        out_channels: Output channels, all groups together.
        kernel_size: Spatial kernel extents, one entry per spatial dimension; `()` for a linear layer.
        groups: Number of groups.
        transposed: Whether this is a transposed convolution.
        positions_in: Input positions (batch times space), summed over the calls that one run of the example makes.
        positions_out: Output positions, summed in the same way.
        calls: How often one run of the example input calls the module.
        found_by: `"fx"` (a node of the traced graph), `"leaf"` (inside a module that the tracer does not enter),
            `"child"` (a node of a child's graph, as the root cannot be traced), `"tree"` (only in the module tree).
        aliases: Further qualified names of the same module.
        skip_reason: Why the site stays dense, or None where it can be replaced.
        has_bias: Whether the dense layer has a bias.
        own_flops: Flops of the dense layer besides the convolution, such as weight standardization, by fvcore's count.
        own_params: Parameters of the dense layer besides weight and bias.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    transposed: bool
    positions_in: int
    positions_out: int
    calls: int
    found_by: FoundBy
    aliases: tuple[str, ...] = ()
    skip_reason: str | None = None
    has_bias: bool = False
    own_flops: int = 0
    own_params: int = 0

    @property
    def group_in_channels(self) -> int:
        """Input channels of one group: the full rank of mode 1."""
        return self.in_channels // self.groups

    @property
    def group_out_channels(self) -> int:
        """Output channels of one group: the full rank of mode 0."""
        return self.out_channels // self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether every kernel extent is 1, so that Tucker-2 is an SVD pair without a core."""
        return all(extent == 1 for extent in self.kernel_size)

    @property
    def modes(self) -> tuple[int, ...]:
        """The channel modes whose rank is reduced: both, or at a pointwise site the one with fewer channels."""
        if not self.is_pointwise:
            return (0, 1)
        return (0,) if self.out_channels <= self.in_channels else (1,)
