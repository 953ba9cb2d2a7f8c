"""From a budget on the whole model to what its sites can be, and to what they may cost together."""

import math
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, replace
from operator import itemgetter
from typing import Self

import numpy as np

from batude_fx.budget.budget import Budget
from batude_fx.budget.knapsack import describe_cost
from batude_fx.budget.rank_options import UNITS, RankOptions, options_by_site, smallest_costs
from batude_fx.errors import BudgetError
from batude_fx.graph.sites import ConvSite
from batude_fx.support.arrays import Integers
from batude_fx.tucker.ranks import Ranks

_UNLIMITED = 2**60
_STEEPEST = 4.0  # slope from what sites foresee to what a network takes, and one over the flattest


@dataclass(frozen=True)
class CostLimits:
    """What a whole model may cost, and what it costs besides its sites.

    Attributes:
        budget: On the whole model.
        dense: (k,) costs of the whole dense model: flops, parameters and, where they were measured, nanoseconds.
        fixed: (k,) what everything but the sites costs.
        round_to: Multiple of the ranks, for messages.
        timed: The compressed networks that were timed as a whole, the last one last: nanoseconds that the times of the
            sites foresee, and nanoseconds that it took.
    """

    budget: Budget
    dense: tuple[int, ...]
    fixed: Integers
    round_to: int
    timed: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, options: Collection[RankOptions], budget: Budget, dense: tuple[int, ...], round_to: int) -> Self:
        """The account of a model whose sites have these options."""
        sites = sum((option.dense for option in options), start=np.zeros(len(dense), np.int64))
        return cls(budget, dense, np.array(dense, np.int64) - sites, round_to)

    def with_timed(self, foreseen: int, taken: int) -> Self:
        """The account that knows a network's time."""
        return replace(self, timed=(*self.timed, (foreseen, taken)))

    def taken(self, foreseen: int) -> int:
        """Nanoseconds of a network for which the times of the sites foresee so many."""
        slope, offset = self._line()
        return round(slope * foreseen + offset)

    def foreseen(self, taken: int) -> int:
        """The inverse of `taken`."""
        slope, offset = self._line()
        return math.floor((taken - offset) / slope)

    def _line(self) -> tuple[float, float]:
        """Slope and offset of the line through two networks: the nearest ones above and below the limit.

        While there is none below, it is the line through the dense one and the one that was timed last, which it ends
        at. The sites' times may be of another day, when the machine was less busy, and they leave out what layers wait
        for.
        """
        dense = self.dense[2], self.dense[2]
        limit = self.budget.limits(*self.dense).nanoseconds or 0
        low, high = (self.timed or (dense,))[-1], dense
        if below := [one for one in self.timed if one[1] <= limit]:
            low = max(below, key=itemgetter(1))
            above = (one for one in (dense, *self.timed) if one[1] > limit)
            high = min(above, key=itemgetter(1), default=dense)
        slope = (high[1] - low[1]) / (high[0] - low[0]) if low[0] < high[0] else 1.0
        slope = min(max(slope, 1 / _STEEPEST), _STEEPEST)
        return slope, low[1] - slope * low[0]

    def capacity(self, options: Collection[RankOptions]) -> Integers:
        """(k,) what is left for all sites together.

        Raises:
            BudgetError: Out of reach; the message names the smallest budget that is not.
        """
        if self.budget.latency is not None and len(self.dense) < len(UNITS):
            raise BudgetError(f"{self.budget}: no times have been measured; call plan with a latency first.")
        limits = astuple(self.budget.limits(*self.dense))[: len(self.dense)]
        most = np.array([_UNLIMITED if limit is None else limit for limit in limits], np.int64)
        smallest = (self.fixed + smallest_costs(options) if options else self.fixed).tolist()
        smallest[2:] = [self.taken(nanoseconds) for nanoseconds in smallest[2:]]
        for unit, need, allowed, full in zip(UNITS, smallest, most.tolist(), self.dense, strict=False):
            if need > allowed and not options:
                raise BudgetError(
                    f"budget of {allowed / full:.4f} of the {unit} is out of reach: no site can be replaced; "
                    "print(batude_fx.discover(model)) says why."
                )
            if need > allowed:
                share = f"{describe_cost(need, unit, alone=False)} of {describe_cost(full, unit)}"
                least = _reachable(need, full)
                way_out = f"Use at least {least:.4f}" if least < 1 else "Use a smaller round_to, or more sites"
                raise BudgetError(
                    f"budget of {allowed / full:.4f} of the {unit} is out of reach: the smallest ranks (multiples of "
                    f"{self.round_to}) at every replaceable site, {len(options)} in all, still need {share}. "
                    f"{way_out}."
                )
        most[2:] = [self.foreseen(nanoseconds) for nanoseconds in most[2:].tolist()]
        return most - self.fixed


def options_within_budget(
    sites: Mapping[str, ConvSite],
    round_to: int,
    budget: Budget,
    dense: tuple[int, ...],
    ranks: Mapping[str, Ranks | None],
    *,
    adds_bias: bool,
) -> tuple[dict[str, RankOptions], CostLimits]:
    """What each site can be and what the whole model may cost, once it is known that the budget is in reach.

    Args:
        sites: As for `choices`.
        round_to: As for `choices`.
        budget: On the whole model, without latency.
        dense: (2,) flops and parameters of the whole dense model.
        ranks: As for `choices`.
        adds_bias: As for `choices`.

    Raises:
        BudgetError: Out of reach.
        SelectionError: As `choices`.
    """
    options = options_by_site(sites, round_to, ranks, adds_bias=adds_bias)
    account = CostLimits.of(options.values(), budget, dense, round_to)
    account.capacity(options.values())
    return options, account


def _reachable(need: int, full: int) -> float:
    """The smallest fraction of four digits that, multiplied and rounded down as a budget is, allows what is needed."""
    digits = math.ceil(need / full * 1e4)
    return (digits if math.floor(digits / 1e4 * full) >= need else digits + 1) / 1e4
