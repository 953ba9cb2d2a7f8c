"""Sites, losses and limits to ranks: a multiple-choice knapsack. Integers and arrays; no model in sight.

Every site offers its rank pairs, dense included, each with a cost and a loss; one option per site is picked so that
the sum of losses is small and the sum of costs stays within the limits. A Lagrange multiplier, found by bisection,
gives a point on the convex hull of all solutions; what it leaves unspent is then spent move by move.

Source: P. Sinha, A. Zoltners, "The multiple-choice knapsack problem", Operations Research 27(3), 1979;
H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", Springer 2004, chapter 11.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd

import numpy as np
from numpy.typing import NDArray

from batude_fx.errors import BudgetError
from batude_fx.flops import dense_cost, tucker_cost
from batude_fx.sites import ConvSite

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

UNITS = ("flops", "params", "latency")
"""Of the costs, in their order; latency in nanoseconds."""

_PARTS = {1: 1, 2: 10, 3: 5}  # in which prices are shared out among so many limits that bind


@dataclass(frozen=True)
class SiteLoss:
    """What one site would lose at each rank; the loss of a rank pair is the sum over both modes.

    Attributes:
        out: (c_out + 1,) loss of keeping r directions of mode 0, r = 0 ... c_out, with c_out per group; the last is 0.
        in_: (c_in + 1,) likewise for mode 1; zeros at a pointwise site, whose one rank `out` already judges.
    """

    out: Floats
    in_: Floats


@dataclass(frozen=True)
class Options:
    """What one site can be: dense, or one of the rank pairs that need fewer flops.

    Attributes:
        ranks: (n, 2) rank_out and rank_in per group; the full ranks mean "leave it dense".
        costs: (n, k) flops, parameters and, where they were measured, nanoseconds.
        losses: (n,), 0 for the dense one, and for all before `judged`.
        dense: (k,) costs of the dense site.
    """

    ranks: Integers
    costs: Integers
    losses: Floats
    dense: Integers

    def judged(self, loss: SiteLoss) -> "Options":
        """The same options with the losses of their ranks."""
        replaced = (self.costs != self.dense).any(axis=1)
        losses = np.zeros(len(self.losses))
        losses[replaced] = loss.out[self.ranks[replaced, 0]] + loss.in_[self.ranks[replaced, 1]]
        return replace(self, losses=losses)

    def only(self, rank_out: int, rank_in: int) -> "Options | None":
        """The same site with these ranks and no other choice; None where they are not among the options."""
        rows = np.flatnonzero((self.ranks == (rank_out, rank_in)).all(axis=1))
        return self.at(rows) if len(rows) else None

    def at(self, rows: Integers) -> "Options":
        """The same site with these rows (m,) for its choices."""
        return replace(self, ranks=self.ranks[rows], costs=self.costs[rows], losses=self.losses[rows])


def rank_candidates(channels: int, groups: int, round_to: int) -> list[int]:
    """Ranks per group of one mode: multiples of `round_to` over all groups together, and the full rank."""
    step = round_to // gcd(groups, round_to)
    return [*range(step, channels, step), channels]


def site_options(site: ConvSite, round_to: int, *, adds_bias: bool = False) -> Options:
    """All rank pairs of one site that need fewer flops than the dense layer, and the dense layer; not judged yet.

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
    cheaper = costs[:, 0] < dense[0] - site.own_flops  # than convolving: full ranks decompose nothing
    ranks, costs = ranks[cheaper], costs[cheaper]
    costs[:, 1] += site.out_channels * (adds_bias and not site.has_bias)
    return Options(
        ranks=np.concatenate([np.array([[c_out, c_in]], np.int64), ranks]),
        costs=np.concatenate([dense[None], costs]),
        losses=np.zeros(1 + len(ranks)),
        dense=dense,
    )


def allocate(options: Sequence[Options], capacity: Integers) -> list[int]:
    """Pick one option per site: the smallest sum of losses that can be found with every cost inside its capacity.

    Args:
        options: What each site can be.
        capacity: (k,) most of each cost, of all sites together.

    Returns:
        The row picked in each site's options.

    Raises:
        BudgetError: When no choice fits.
    """
    if not options:
        return []
    directions = _price_directions(options, capacity)
    # What is dominated at all of these prices is hardly worth a look, and nearly every row is where ranks are fine.
    rows = [np.unique(np.concatenate([_pareto_front(one, weights) for weights in directions])) for one in options]
    options = [one.at(kept) for one, kept in zip(options, rows, strict=True)]
    best: list[int] | None = None
    for weights in directions:
        fronts = [_pareto_front(option, weights) for option in options]
        picked = _lagrangian(options, fronts, capacity, weights)
        if picked is None:
            continue
        picked = _spend_remainder(options, picked, capacity)
        if best is None or _total_loss(options, picked) < _total_loss(options, best):
            best = picked
    if best is None:
        limits = " and ".join(map(amount, capacity.tolist(), UNITS))
        raise BudgetError(
            f"no choice of ranks keeps the replaceable sites within {limits}, though each limit can be met alone; "
            "raise one of them."
        )
    return [int(kept[row]) for kept, row in zip(rows, best, strict=True)]


def amount(cost: int, unit: str, *, alone: bool = True) -> str:
    """A cost in words: "5,000 flops", "1.2 ms"; without its unit where another one follows."""
    number, name = (f"{cost / 1e6:.4g}", "ms") if unit == "latency" else (f"{cost:,}", unit)
    return f"{number} {name}" if alone else number


def smallest_costs(options: Collection[Options]) -> Integers:
    """(k,) the least of each cost that any choice of ranks needs; each on its own."""
    smallest: Integers = np.sum([option.costs.min(axis=0) for option in options], axis=0)
    return smallest


def _price_directions(options: Sequence[Options], capacity: Integers) -> list[Floats]:
    """Prices of each cost to try: shares of a whole among the limits that bind; a single one needs a single try."""
    dense = np.sum([option.dense for option in options], axis=0, dtype=np.float64)
    unit = 1 / np.maximum(dense, 1)
    binding = np.flatnonzero(capacity < dense)
    if not len(binding):
        binding = np.array([0])
    parts = _PARTS[len(binding)]
    shares = (np.array(one) / parts for one in product(range(parts + 1), repeat=len(binding)) if sum(one) == parts)
    return [unit * (np.eye(len(unit))[binding].T @ share) for share in shares]


def _pareto_front(option: Options, weights: Floats) -> Integers:
    """Rows that no other row beats in both price and loss, from the cheapest to the dense one."""
    prices = option.costs @ weights
    order = np.lexsort((option.losses, prices))
    losses = option.losses[order]
    better = np.concatenate([[True], losses[1:] < np.minimum.accumulate(losses)[:-1]])
    front: Integers = order[better]
    return front


def _lagrangian(
    options: Sequence[Options], fronts: Sequence[Integers], capacity: Integers, weights: Floats
) -> list[int] | None:
    """Minimise loss + multiplier * price at every site, with the smallest multiplier that meets the capacity."""
    width = max(len(front) for front in fronts)
    losses = np.full((len(fronts), width), np.inf)
    prices = np.zeros((len(fronts), width))
    costs = np.zeros((len(fronts), width, len(capacity)), np.int64)
    for row, (option, front) in enumerate(zip(options, fronts, strict=True)):
        losses[row, : len(front)] = option.losses[front]
        costs[row, : len(front)] = option.costs[front]
        prices[row, : len(front)] = option.costs[front] @ weights
    sites = np.arange(len(fronts))

    def choose(multiplier: float) -> tuple[Integers, bool]:
        column = np.argmin(losses + multiplier * prices, axis=1)
        return column, bool((costs[sites, column].sum(axis=0) <= capacity).all())

    high = 1.0
    while not choose(high)[1]:
        high *= 4
        if high > 1e60:  # noqa: PLR2004 - no saving of loss pays such a price: nothing fits
            return None
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if choose(middle)[1] else (middle, high)
    column, _ = choose(high)
    return [int(front[c]) for front, c in zip(fronts, column, strict=True)]


def _spend_remainder(options: Sequence[Options], picked: list[int], capacity: Integers) -> list[int]:
    """Take the move with the most loss saved per unit of remaining capacity, until no move fits."""
    site_of = np.concatenate([np.full(len(option.losses), site) for site, option in enumerate(options)])
    first = np.cumsum([0, *(len(option.losses) for option in options)])
    losses = np.concatenate([option.losses for option in options])
    costs = np.concatenate([option.costs for option in options])
    at = first[:-1] + np.array(picked)
    while True:
        slack = capacity - costs[at].sum(axis=0)
        extra = costs - costs[at][site_of]
        saved = losses[at][site_of] - losses
        usable = (extra <= slack).all(axis=1) & (saved > 0)
        if not usable.any():
            return [int(index - start) for index, start in zip(at, first[:-1], strict=True)]
        share = np.maximum(extra / np.maximum(slack, 1), 1e-12).max(axis=1)
        move = int(np.argmax(np.where(usable, saved / share, -np.inf)))
        at[site_of[move]] = move


def _total_loss(options: Sequence[Options], picked: Sequence[int]) -> float:
    return float(sum(option.losses[row] for option, row in zip(options, picked, strict=True)))
