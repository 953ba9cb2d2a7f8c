"""The options of a site: dense, or a pair of ranks that needs fewer flops; each with its costs and its loss."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from batude_fx.errors import SelectionError
from batude_fx.graph.flops import dense_cost, tucker_cost
from batude_fx.graph.sites import ConvSite
from batude_fx.support.arrays import Booleans, Floats, Integers
from batude_fx.tucker.ranks import Ranks, SiteLoss

UNITS = ("flops", "params", "latency")
"""The costs in the order of the last axis of every array of costs; latency in nanoseconds."""
FLOPS, PARAMS, NANOSECONDS = range(3)
"""Their places on that axis."""


@dataclass(frozen=True)
class RankOptions:
    """What one site can be: dense, or one of the rank pairs that need fewer flops.

    Attributes:
        ranks: (n, 2) rank_out and rank_in per group; the full ranks mean "leave it dense".
        costs: (n, k) flops, parameters and, where they were measured, nanoseconds.
        losses: (n,) predicted loss; 0 for the dense one, and for all before `with_losses`.
        dense: (k,) costs of the dense site.
    """

    ranks: Integers
    costs: Integers
    losses: Floats
    dense: Integers

    @property
    def is_dense(self) -> Booleans:
        """(n,) which of the options leaves the site dense; all others need fewer flops."""
        dense: Booleans = (self.costs == self.dense).all(axis=1)
        return dense

    def with_losses(self, loss: SiteLoss) -> "RankOptions":
        """Return the same options with the losses of their ranks."""
        replaced = ~self.is_dense
        losses = np.zeros(len(self.losses))
        losses[replaced] = loss.out[self.ranks[replaced, 0]] + loss.in_[self.ranks[replaced, 1]]
        return replace(self, losses=losses)

    def only_at(self, rank_out: int, rank_in: int) -> "RankOptions | None":
        """Return the same site with these ranks as its only option; None where they are not among the options."""
        rows = np.flatnonzero((self.ranks == (rank_out, rank_in)).all(axis=1))
        return self.subset(rows) if len(rows) else None

    def subset(self, rows: Integers) -> "RankOptions":
        """Return the same site with only these rows (m,) as its options."""
        return replace(self, ranks=self.ranks[rows], costs=self.costs[rows], losses=self.losses[rows])


def rank_candidates(channels: int, groups: int, round_to: int) -> list[int]:
    """List the ranks per group of one mode: multiples of `round_to` over all groups together, and the full rank."""
    step = round_to // gcd(groups, round_to)
    return [*range(step, channels, step), channels]


def site_options(site: ConvSite, round_to: int, *, adds_bias: bool = False) -> RankOptions:
    """List the dense layer and all rank pairs of one site that need fewer flops; their losses are still 0.

    Args:
        site: Any site that can be replaced.
        round_to: Multiple of the ranks, all groups together.
        adds_bias: Whether the replacement has a bias even where the dense layer has none.
    """
    c_out, c_in, groups = site.group_out_channels, site.group_in_channels, site.groups
    if site.is_pointwise:
        rank = np.array(rank_candidates(min(c_in, c_out), groups, round_to)[:-1], np.int64)
        ranks = np.stack([rank, rank], axis=1)
    else:
        candidates = rank_candidates(c_out, groups, round_to), rank_candidates(c_in, groups, round_to)
        ranks = np.stack(np.meshgrid(*candidates, indexing="ij"), axis=-1).reshape(-1, 2)
    costs = np.stack(tucker_cost(site, ranks[:, 0], ranks[:, 1]), axis=1)  # (n, 2)
    dense = np.array(dense_cost(site), np.int64)
    # Compared with the convolution alone: at full ranks nothing is decomposed.
    cheaper = costs[:, FLOPS] < dense[FLOPS] - site.own_flops
    ranks, costs = ranks[cheaper], costs[cheaper]
    costs[:, PARAMS] += site.out_channels * (adds_bias and not site.has_bias)
    return RankOptions(
        ranks=np.concatenate([np.array([[c_out, c_in]], np.int64), ranks]),
        costs=np.concatenate([dense[None], costs]),
        losses=np.zeros(1 + len(ranks)),
        dense=dense,
    )


def describe_cost(cost: int, unit: str, *, with_unit: bool = True) -> str:
    """Return a cost in words: "5,000 flops", "1.2 ms"; without its unit where another cost with one follows."""
    number, name = (f"{cost / 1e6:.4g}", "ms") if unit == "latency" else (f"{cost:,}", unit)
    return f"{number} {name}" if with_unit else number


def smallest_costs(options: Collection[RankOptions]) -> Integers:
    """Return (k,) the least of each cost that any choice of ranks needs, each cost taken alone."""
    smallest: Integers = np.sum([option.costs.min(axis=0) for option in options], axis=0)
    return smallest


def options_by_site(
    sites: Mapping[str, ConvSite], round_to: int, ranks: Mapping[str, Ranks | None], *, adds_bias: bool
) -> dict[str, RankOptions]:
    """List what each site can be, with a single option where the user fixed the ranks.

    Args:
        sites: Name to site, all of them replaceable.
        round_to: Multiple of the ranks, all groups of a site together.
        ranks: Site name to ranks that are fixed beforehand; None keeps a site dense.
        adds_bias: Whether replacements have a bias even where the dense layer has none.

    Raises:
        SelectionError: A name is no site, or its ranks are not among what the site can be.
    """
    if unknown := [name for name in ranks if name not in sites]:
        raise SelectionError(f"ranks are given for {unknown[0]!r}, which is no replaceable site; see discover(model).")
    options = {name: site_options(site, round_to, adds_bias=adds_bias) for name, site in sites.items()}
    for name, fixed in ranks.items():
        if not isinstance(fixed, Ranks | None):
            raise SelectionError(f"ranks of {name!r} are {fixed!r}; give Ranks(rank_out, rank_in), or None for dense.")
        full = Ranks(rank_out=sites[name].group_out_channels, rank_in=sites[name].group_in_channels)
        chosen = fixed or full
        single = options[name].only_at(chosen.rank_out, chosen.rank_in)
        if single is None:
            raise SelectionError(
                f"{fixed} at {name!r} is not among its options: multiples of {round_to}, all groups together, up to "
                f"{full} per group, that need fewer flops than the dense layer."
            )
        options[name] = single
    return options
