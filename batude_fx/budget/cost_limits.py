"""What a whole model may cost, and what of that is left for its sites; and the model of its latency.

Costs are arrays whose last axis is (flops, params) or, where times were measured, (flops, params, nanoseconds); see
`rank_options.UNITS`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from operator import attrgetter
from typing import Self

import numpy as np

from batude_fx.budget.budget import Budget
from batude_fx.budget.rank_options import (
    NANOSECONDS,
    UNITS,
    RankOptions,
    describe_cost,
    options_by_site,
    smallest_costs,
)
from batude_fx.errors import BudgetError
from batude_fx.graph.sites import ConvSite
from batude_fx.support.arrays import Integers
from batude_fx.tucker.ranks import Ranks

_UNLIMITED = 2**60
_STEEPEST = 4.0  # slope of a latency model, and one over the flattest


@dataclass(frozen=True)
class TimedNetwork:
    """A network that was timed as a whole.

    Attributes:
        site_time: Nanoseconds that the times of its sites, each timed alone, and the time of all else add up to.
        network_time: Nanoseconds that one run of it took.
    """

    site_time: int
    network_time: int


@dataclass(frozen=True)
class LatencyModel:
    """The line `network_time = slope * site_time + offset`.

    The two times differ as the sites may have been timed on another day, when the machine was less busy, and as layers
    that are timed alone do not wait for each other.
    """

    slope: float
    offset: float

    @classmethod
    def near(cls, limit: int, dense: TimedNetwork, timed: Sequence[TimedNetwork]) -> Self:
        """Return the line through the networks that were timed nearest above and below a limit.

        While there is none below, it is the line through the dense network and the one that was timed last.

        Args:
            limit: Nanoseconds that a network may take.
            dense: The dense network, whose site time is its network time by definition.
            timed: Compressed networks, the last one last.
        """
        low, high = (timed or [dense])[-1], dense
        if below := [network for network in timed if network.network_time <= limit]:
            low = max(below, key=attrgetter("network_time"))
            above = (network for network in (dense, *timed) if network.network_time > limit)
            high = min(above, key=attrgetter("network_time"), default=dense)
        slope = 1.0
        if low.site_time < high.site_time:
            slope = (high.network_time - low.network_time) / (high.site_time - low.site_time)
        slope = min(max(slope, 1 / _STEEPEST), _STEEPEST)
        return cls(slope, low.network_time - slope * low.site_time)

    def predict(self, site_time: int) -> int:
        """Return the nanoseconds of the network whose sites add up to a time."""
        return round(self.slope * site_time + self.offset)

    def invert(self, network_time: int) -> int:
        """Return the nanoseconds that the sites may add up to, so that the network takes no more than a time."""
        return math.floor((network_time - self.offset) / self.slope)


@dataclass(frozen=True)
class CostLimits:
    """What a whole model may cost, and what it costs besides its sites.

    Attributes:
        budget: The limits on the whole model.
        dense: (k,) costs of the whole dense model.
        fixed: (k,) costs of everything but the sites.
        round_to: Multiple of the ranks, for messages.
        notes: What stays dense and why, for messages.
        timed: The compressed networks that were timed as a whole, the last one last.
    """

    budget: Budget
    dense: tuple[int, ...]
    fixed: Integers
    round_to: int
    notes: str = ""
    timed: tuple[TimedNetwork, ...] = ()

    @classmethod
    def of_sites(cls, options: Collection[RankOptions], budget: Budget, dense: tuple[int, ...], round_to: int) -> Self:
        """Return the limits for a model whose sites have these options."""
        sites = sum((option.dense for option in options), start=np.zeros(len(dense), np.int64))
        return cls(budget, dense, np.array(dense, np.int64) - sites, round_to)

    @property
    def latency(self) -> int | None:
        """The most nanoseconds of one run; None where time is not limited."""
        return self.budget.limits(*self.dense).nanoseconds

    @property
    def latency_model(self) -> LatencyModel:
        """The line from the times of sites to that of the network; for limits that know times."""
        dense = TimedNetwork(self.dense[NANOSECONDS], self.dense[NANOSECONDS])
        return LatencyModel.near(self.latency or 0, dense, self.timed)

    def with_timed(self, network: TimedNetwork) -> Self:
        """Return the limits that know one more timed network."""
        return replace(self, timed=(*self.timed, network))

    def capacity(self, options: Collection[RankOptions]) -> Integers:
        """Return (k,) what all sites together may cost.

        Raises:
            BudgetError: The budget is out of reach; the message names the smallest one that is not.
        """
        if self.budget.latency is not None and len(self.dense) <= NANOSECONDS:
            raise BudgetError(f"{self.budget}: no times have been measured; call plan with a latency first.")
        limits = astuple(self.budget.limits(*self.dense))[: len(self.dense)]
        most = np.array([_UNLIMITED if limit is None else limit for limit in limits], np.int64)
        least = self.fixed + smallest_costs(options) if options else self.fixed.copy()
        if len(self.dense) > NANOSECONDS:
            least[NANOSECONDS] = self.latency_model.predict(int(least[NANOSECONDS]))
        for cost, unit in enumerate(UNITS[: len(self.dense)]):
            if least[cost] > most[cost]:
                raise self._out_of_reach(unit, int(least[cost]), int(most[cost]), self.dense[cost], len(options))
        if len(self.dense) > NANOSECONDS:
            most[NANOSECONDS] = self.latency_model.invert(int(most[NANOSECONDS]))
        return most - self.fixed

    def _out_of_reach(self, unit: str, least: int, most: int, dense: int, sites: int) -> BudgetError:
        """Return the error for a cost whose least value is above its limit, with the way out."""
        budget = f"budget of {_share(most / dense)} of the {unit} is out of reach"
        if not sites:
            return BudgetError(f"{budget}: no site can be replaced; print(batude_fx.discover(model)) says why.")
        keep = _smallest_keep(least, dense)
        way_out = f"Use at least {keep:.4f}" if keep < 1 else "Use a smaller round_to, or more sites"
        return BudgetError(
            f"{budget}: the smallest ranks (multiples of {self.round_to}) at every replaceable site, {sites} in all, "
            f"still need {describe_cost(least, unit, with_unit=False)} of {describe_cost(dense, unit)}.{self.notes} "
            f"{way_out}."
        )


@dataclass(frozen=True)
class SearchSpace:
    """What a search for ranks may choose from.

    Attributes:
        options: Site name to what the site can be.
        limits: What the whole model may cost.
    """

    options: Mapping[str, RankOptions]
    limits: CostLimits

    def capacity(self) -> Integers:
        """Return (k,) what all sites together may cost.

        Raises:
            BudgetError: The budget is out of reach.
        """
        return self.limits.capacity(self.options.values())


def make_search_space(
    sites: Mapping[str, ConvSite],
    round_to: int,
    budget: Budget,
    dense: tuple[int, ...],
    ranks: Mapping[str, Ranks | None],
    *,
    adds_bias: bool,
    notes: str = "",
) -> SearchSpace:
    """List what each site can be and what the whole model may cost, and check that the budget is in reach.

    Args:
        sites: Name to site, all of them replaceable.
        round_to: Multiple of the ranks, all groups of a site together.
        budget: On the whole model, without latency.
        dense: (2,) flops and parameters of the whole dense model.
        ranks: Site name to ranks that are fixed beforehand; None keeps a site dense.
        adds_bias: Whether replacements have a bias even where the dense layer has none.
        notes: What stays dense and why, for messages.

    Raises:
        BudgetError: The budget is out of reach.
        SelectionError: A name in `ranks` is no site, or its ranks are not among what the site can be.
    """
    options = options_by_site(sites, round_to, ranks, adds_bias=adds_bias)
    limits = replace(CostLimits.of_sites(options.values(), budget, dense, round_to), notes=notes)
    space = SearchSpace(options, limits)
    space.capacity()
    return space


def _smallest_keep(least: int, dense: int) -> float:
    """Return the smallest fraction of four digits that allows a cost, when it is rounded down as a budget is."""
    digits = math.ceil(least / dense * 1e4)
    return (digits if math.floor(digits / 1e4 * dense) >= least else digits + 1) / 1e4


def _share(keep: float) -> str:
    """Return a share with four decimals, which are never all zero."""
    return "less than 0.0001" if keep < 1e-4 else f"{keep:.4f}"  # noqa: PLR2004 - four decimals
