"""From the options of all sites to one option per site: a multiple-choice knapsack. Integers and arrays only.

Every site offers its rank pairs, dense included, each with costs and a loss. One option per site is picked so that the
sum of losses is small and every sum of costs stays within its capacity:

    minimise sum_s loss_s(i_s)  subject to  sum_s cost_s(i_s) <= capacity.

Each option gets one price, a weighted sum of its costs. For a given multiplier m, the option with the least loss + m *
price can be picked at each site separately, and the smallest m whose choice fits gives a point on the convex hull of
all solutions. It is found by bisection. What that choice leaves of the capacity is then spent move by move. Where
several limits bind, several sets of weights are tried.

Source: P. Sinha, A. Zoltners, "The multiple-choice knapsack problem", Operations Research 27(3), 1979;
H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", Springer 2004, chapter 11.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from batude_fx.budget.rank_options import UNITS, RankOptions, describe_cost
from batude_fx.errors import BudgetError
from batude_fx.support.arrays import Floats, Integers

_PARTS_BY_LIMITS = {1: 1, 2: 10, 3: 5}  # number of binding limits: into how many equal parts the weights are split


def allocate(options: Sequence[RankOptions], capacity: Integers) -> list[int]:
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
    weights_to_try = _weights_to_try(options, capacity)
    # An option that is dominated at all of these prices is hardly ever picked, and with fine ranks most of them are.
    rows = [np.unique(np.concatenate([_pareto_front(site, weights) for weights in weights_to_try])) for site in options]
    options = [site.subset(front) for site, front in zip(options, rows, strict=True)]
    best: list[int] | None = None
    for weights in weights_to_try:
        fronts = [_pareto_front(option, weights) for option in options]
        picked = _choose_by_multiplier(options, fronts, capacity, weights)
        if picked is None:
            continue
        picked = _spend_remainder(options, picked, capacity)
        if best is None or _total_loss(options, picked) < _total_loss(options, best):
            best = picked
    if best is None:
        limits = " and ".join(map(describe_cost, capacity.tolist(), UNITS))
        raise BudgetError(
            f"no choice of ranks keeps the replaceable sites within {limits}, though each limit can be met alone; "
            "raise one of them."
        )
    return [int(front[row]) for front, row in zip(rows, best, strict=True)]


def _weights_to_try(options: Sequence[RankOptions], capacity: Integers) -> list[Floats]:
    """Return the weights (k,) of the costs to try; one binding limit needs only one set of weights."""
    dense = np.sum([option.dense for option in options], axis=0, dtype=np.float64)
    unit = 1 / np.maximum(dense, 1)  # so that every cost of the dense model counts as 1
    binding = np.flatnonzero(capacity < dense)
    if not len(binding):
        binding = np.array([0])
    parts = _PARTS_BY_LIMITS[len(binding)]
    shares = (share for share in product(range(parts + 1), repeat=len(binding)) if sum(share) == parts)
    return [unit * (np.eye(len(unit))[binding].T @ (np.array(share) / parts)) for share in shares]


def _pareto_front(option: RankOptions, weights: Floats) -> Integers:
    """Rows that no other row beats in both price and loss, from the cheapest to the one that loses least."""
    prices = option.costs @ weights
    order = np.lexsort((option.losses, prices))
    losses = option.losses[order]
    better = np.concatenate([[True], losses[1:] < np.minimum.accumulate(losses)[:-1]])
    front: Integers = order[better]
    return front


def _choose_by_multiplier(
    options: Sequence[RankOptions], fronts: Sequence[Integers], capacity: Integers, weights: Floats
) -> list[int] | None:
    """Minimise loss + multiplier * price at every site, with the smallest multiplier that meets the capacity.

    The larger the multiplier, the cheaper the choice, so that bisection finds it. None where no choice fits.
    """
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
        columns = np.argmin(losses + multiplier * prices, axis=1)
        return columns, bool((costs[sites, columns].sum(axis=0) <= capacity).all())

    high = 1.0
    while not choose(high)[1]:
        high *= 4
        if high > 1e60:  # noqa: PLR2004 - even so high a multiplier gives no choice that fits
            return None
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if choose(middle)[1] else (middle, high)
    columns, _ = choose(high)
    return [int(front[column]) for front, column in zip(fronts, columns, strict=True)]


def _spend_remainder(options: Sequence[RankOptions], picked: list[int], capacity: Integers) -> list[int]:
    """Move single sites to other options: the most loss saved per share of what is left, until no move fits."""
    site_of = np.concatenate([np.full(len(option.losses), site) for site, option in enumerate(options)])
    first = np.cumsum([0, *(len(option.losses) for option in options)])
    losses = np.concatenate([option.losses for option in options])
    costs = np.concatenate([option.costs for option in options])
    current = first[:-1] + np.array(picked)  # (sites,) rows of the concatenated options
    while True:
        slack = capacity - costs[current].sum(axis=0)
        extra = costs - costs[current][site_of]
        saved = losses[current][site_of] - losses
        usable = (extra <= slack).all(axis=1) & (saved > 0)
        if not usable.any():
            return [int(index - start) for index, start in zip(current, first[:-1], strict=True)]
        share = np.maximum(extra / np.maximum(slack, 1), 1e-12).max(axis=1)
        move = int(np.argmax(np.where(usable, saved / share, -np.inf)))
        current[site_of[move]] = move


def _total_loss(options: Sequence[RankOptions], picked: Sequence[int]) -> float:
    return float(sum(option.losses[row] for option, row in zip(options, picked, strict=True)))
