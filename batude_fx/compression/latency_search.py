"""Ranks that meet a latency: sites get times, then the whole network is timed until it meets the limit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from batude_fx.budget.budget import Budget
from batude_fx.budget.cost_limits import CostLimits, SearchSpace, TimedNetwork
from batude_fx.budget.layer_timer import LayerTimer
from batude_fx.budget.rank_multiple import suitable_multiples
from batude_fx.budget.rank_options import NANOSECONDS, RankOptions
from batude_fx.compression.rank_search import RankPlan, SiteCandidate, choose_ranks
from batude_fx.errors import BudgetError, SelectionError
from batude_fx.support.progress import track
from batude_fx.support.user_warning import warn_user
from batude_fx.tucker.ranks import Ranks

_MOST_TRIALS = 6
_CLOSE = 0.02  # below the limit: near enough to stop
_TOLERATED = 0.05  # above the limit: met within the accuracy of the clock


def with_latency(
    space_for: Callable[[int], SearchSpace], budget: Budget, timer: LayerTimer, round_to: int | Literal["auto"]
) -> SearchSpace:
    """Return the search space with measured times, and check that the budget is in reach.

    For "auto", ranks are multiples that suit the machine, and options slower than the dense layer are left out. If the
    budget cannot be met that way, finer multiples are tried. Then, if flops or parameters are limited too, slower
    options are allowed, again from the largest multiple on.

    Args:
        space_for: Returns the search space for a rank multiple, with limits on flops and parameters.
        budget: On the whole model, latency included.
        timer: Times the sites and the network.
        round_to: Multiple of the ranks.

    Raises:
        BudgetError: A limit is out of reach.
        SelectionError: Ranks that the user fixed are no multiples.
    """
    *attempts, last = _attempts(budget, timer, round_to)
    for multiple, only_faster in attempts:
        try:
            return _with_times(space_for(multiple), budget, timer, only_faster=only_faster)
        except (BudgetError, SelectionError):
            continue
    multiple, only_faster = last
    return _with_times(space_for(multiple), budget, timer, only_faster=only_faster)


def _attempts(budget: Budget, timer: LayerTimer, round_to: int | Literal["auto"]) -> list[tuple[int, bool]]:
    """Return rank multiples, and whether a site is replaced only where that makes it faster; preferred first."""
    if round_to != "auto":
        return [(round_to, False)]
    multiples = suitable_multiples(timer)
    attempts = [(multiple, True) for multiple in multiples]
    if (budget.flops, budget.params) != (None, None):  # a slower site never helps a latency, but it helps these
        attempts += [(multiple, False) for multiple in multiples]
    return attempts


def _with_times(space: SearchSpace, budget: Budget, timer: LayerTimer, *, only_faster: bool) -> SearchSpace:
    """Return a search space whose options have times and whose limits include the latency."""
    options = timer.with_times(space.options, only_faster=only_faster)
    dense = (*space.limits.dense, timer.dense_nanoseconds)
    limits = CostLimits.of_sites(options.values(), space.limits.budget, dense, space.limits.round_to)
    limits = replace(limits, notes=space.limits.notes)
    limits.capacity(options.values())  # where flops or parameters are out of reach, no network is timed
    limits = replace(limits, budget=budget)
    try:
        limits.capacity(options.values())
    except BudgetError:  # judged by the sum of site times; the network as a whole may be faster
        limits = limits.with_timed(_time_fastest(options, limits, timer))
        limits.capacity(options.values())
    return SearchSpace(options, limits)


def _time_fastest(options: Mapping[str, RankOptions], limits: CostLimits, timer: LayerTimer) -> TimedNetwork:
    """Time the network whose sites all take their fastest option."""
    site_time, ranks = int(limits.fixed[NANOSECONDS]), {}
    for name, option in options.items():
        row = int(option.costs[:, NANOSECONDS].argmin())
        site_time += int(option.costs[row, NANOSECONDS])
        if not option.is_dense[row]:
            ranks[name] = Ranks(*option.ranks[row].tolist())
    return TimedNetwork(site_time, timer.compare(ranks))


@dataclass(frozen=True)
class _Trial:
    """A network that was timed as a whole.

    Attributes:
        plan: Its ranks, with the time that was measured.
        limits: The limits, corrected by this measured time.
        excess: Nanoseconds above the latency that is allowed; 0 or less where it is met.
    """

    plan: RankPlan
    limits: CostLimits
    excess: int


def refine_by_timing(
    plan: RankPlan, timer: LayerTimer, candidates: Mapping[str, SiteCandidate], limits: CostLimits
) -> tuple[RankPlan, CostLimits]:
    """Time the network with the chosen ranks, and choose anew with what that shows, until it meets the limit.

    Returns:
        Of the networks that meet the limit, the one closest to it; if none does, the one least above it. Its plan with
        the measured time, and the limits corrected by that time.

    Raises:
        BudgetError: No network comes close to the limit.

    Warns:
        UserWarning: When networks meet the limit, but none comes close to it.
    """
    trials: list[_Trial] = []
    settled, following = False, None
    for _ in track(range(_MOST_TRIALS), "timing the network"):
        trials.append(_time(plan, timer, limits))
        limits = trials[-1].limits
        other = _choose_or_none(candidates, limits)
        settled = _is_settled(trials[-1], other)
        following = None if settled else _next_plan(trials, other)
        if following is None:
            break
        plan = following
    meets_limit = any(trial.excess <= 0 for trial in trials)
    if not settled and (meets_limit or following is not None):
        warn_user(
            f"in {len(trials)} timings the network did not come within {_CLOSE:.0%} of latency "
            f"{limits.budget.latency}: no ranks give a time nearer to it, or the machine may be busy. The plan says "
            "what was measured."
        )
    best = min(trials, key=lambda trial: (trial.excess > 0, abs(trial.excess)))
    _check_met(best, len(trials), timer.dense_nanoseconds)
    return best.plan, best.limits


def _time(plan: RankPlan, timer: LayerTimer, limits: CostLimits) -> _Trial:
    """Time the network of a plan."""
    network_time = timer.compare(plan.ranks) if plan.ranks else timer.dense_nanoseconds
    timed = TimedNetwork(cast("int", plan.site_time), network_time)
    excess = network_time - (limits.latency or network_time)
    return _Trial(replace(plan, seconds=network_time / 1e9), limits.with_timed(timed), excess)


def _choose_or_none(candidates: Mapping[str, SiteCandidate], limits: CostLimits) -> RankPlan | None:
    """Return the ranks that the limits allow by what was timed so far; None where there are none."""
    try:
        return choose_ranks(candidates, limits)
    except BudgetError:
        return None


def _is_settled(trial: _Trial, other: RankPlan | None) -> bool:
    """Return whether a network is close to the limit, or below it since another limit allows no more."""
    limit = trial.limits.latency
    if limit is None or -_CLOSE * limit <= trial.excess <= 0:
        return True
    return trial.excess <= 0 and other is not None and other.ranks == trial.plan.ranks


def _next_plan(trials: list[_Trial], other: RankPlan | None) -> RankPlan | None:
    """Return the plan to time next, given the one that the trials lead to; None where no trial would tell more."""
    tried = [trial.plan.ranks for trial in trials]
    if other is not None and other.ranks not in tried:
        return other
    # The search goes in a circle, or this is the fastest network there is.
    last = trials[-1].plan
    if any(trial.excess <= 0 for trial in trials) or tried.count(last.ranks) > 1:
        return None
    return last  # once more, as the machine may have been busy


def _check_met(best: _Trial, trials: int, dense_nanoseconds: int) -> None:
    """Refuse a network that is too far above the limit.

    Raises:
        BudgetError: With its time, the dense one's, and the way out.
    """
    limit = best.limits.latency
    if limit is None or best.excess <= _TOLERATED * limit:
        return
    taken = limit + best.excess
    share = taken / dense_nanoseconds
    way_out = f"Use at least {share:.4f}" if share < 1 else "None is faster than the dense one; limit the flops instead"
    raise BudgetError(
        f"latency {limit / 1e6:.4g} ms is out of reach: in {trials} timings the fastest network took "
        f"{taken / 1e6:.4g} ms, the dense one {dense_nanoseconds / 1e6:.4g} ms. {way_out}, or try again while the "
        "machine is idle."
    )
