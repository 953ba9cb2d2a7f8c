"""From judged sites to ranks under a budget; where time is limited, the network itself is timed until it meets it."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace as replaced
from itertools import product
from operator import itemgetter
from typing import Literal, cast

from batude_fx.budget import rank_options
from batude_fx.budget.budget import Budget
from batude_fx.budget.cost_limits import CostLimits
from batude_fx.budget.layer_times import LayerTimer
from batude_fx.compression.rank_search import RankPlan, SiteCandidate, choose_ranks
from batude_fx.errors import BudgetError, SelectionError
from batude_fx.support.progress import track
from batude_fx.tucker.ranks import Ranks

_ROUNDS, _CLOSE, _ALLOWED = 6, 0.02, 0.05  # to meet a latency: trials, when to stop, how much above is bearable


def add_latency(
    count: Callable[[int], tuple[dict[str, rank_options.RankOptions], CostLimits]],
    budget: Budget,
    watch: LayerTimer,
    round_to: int | Literal["auto"],
) -> tuple[dict[str, rank_options.RankOptions], CostLimits]:
    """What each site can be, with its times, and the account of a budget that is in reach.

    For "auto" ranks are multiples that suit the machine, and no site gets slower; where the budget is out of reach so,
    finer multiples are tried, then slower sites.

    Args:
        count: From a multiple of ranks to what each site can be and to the account of flops and parameters.
        budget: Latency included.
        watch: Times the sites and the network.
        round_to: Multiple of the ranks.

    Raises:
        BudgetError: A limit is out of reach.
        SelectionError: Ranks that the user fixed are no multiples.
    """
    multiples = watch.multiples() if round_to == "auto" else [round_to]
    wishes = [round_to == "auto"]  # that only faster sites are replaced
    if round_to == "auto" and (budget.flops, budget.params) != (None, None):  # slower ones never help a latency
        wishes.append(False)
    *preferred, last = product(wishes, multiples)
    for way in preferred:
        with suppress(BudgetError, SelectionError):
            return _timed(way, count, budget, watch)
    return _timed(last, count, budget, watch)


def _timed(
    way: tuple[bool, int],
    count: Callable[[int], tuple[dict[str, rank_options.RankOptions], CostLimits]],
    budget: Budget,
    watch: LayerTimer,
) -> tuple[dict[str, rank_options.RankOptions], CostLimits]:
    only_faster, multiple = way
    options, account = count(multiple)
    options = watch.priced(options, only_faster=only_faster)
    account = CostLimits.of(options.values(), account.budget, (*account.dense, watch.dense_nanoseconds), multiple)
    account.capacity(options.values())  # where flops or parameters are out of reach, the network is not timed
    account = replaced(account, budget=budget)
    try:
        account.capacity(options.values())
    except BudgetError:  # by the times of the sites; the network's own may be shorter
        rows = {name: int(one.costs[:, 2].argmin()) for name, one in options.items()}
        fastest = {
            name: Ranks(*options[name].ranks[row].tolist())
            for name, row in rows.items()
            if not options[name].is_dense[row]
        }
        foreseen = int(account.fixed[2]) + sum(int(options[name].costs[row, 2]) for name, row in rows.items())
        account = account.with_timed(foreseen, watch.compare(fastest))
        account.capacity(options.values())
    return options, account


def refine_by_timing(
    choice: RankPlan, watch: LayerTimer, candidates: Mapping[str, SiteCandidate], account: CostLimits
) -> tuple[RankPlan, CostLimits]:
    """Time the whole network with the chosen ranks, and choose anew with what that tells, until it meets the limit.

    Returns:
        The choice that comes closest to the limit, from below where one does, with its measured time; and the account
        that predicts it right.

    Raises:
        BudgetError: No choice comes close to the limit.
    """
    limit = account.budget.limits(*account.dense).nanoseconds
    tried: list[tuple[tuple[bool, int], RankPlan, CostLimits]] = []
    far, foreseen = False, account.foreseen(round(1e9 * cast("float", choice.seconds)))
    for _ in track(range(_ROUNDS), "timing the network"):
        taken = watch.compare(choice.ranks) if choice.ranks else watch.dense_nanoseconds
        account = account.with_timed(foreseen, taken)
        over = taken - (limit or taken)
        tried.append(((over > 0, abs(over)), replaced(choice, seconds=taken / 1e9), account))
        known = [one.ranks for _, one, _ in tried]
        if limit is None or (1 - _CLOSE) * limit <= taken <= limit:
            break
        with suppress(BudgetError):
            other = choose_ranks(candidates, account)
            if other.ranks not in known:
                choice, foreseen = other, account.foreseen(round(1e9 * cast("float", other.seconds)))
                continue
            if over <= 0 and other.ranks == choice.ranks:  # another limit binds, or no ranks lie between
                break
        # It goes round in a circle; or this network is the fastest, and the machine may have been busy meanwhile.
        met = any(not missed for (missed, _), _, _ in tried)
        if met or known.count(choice.ranks) > 1:
            far = met
            break
    else:
        far = True
    if far:
        warnings.warn(
            f"in {len(tried)} timings the network did not come within {_CLOSE:.0%} of latency "
            f"{account.budget.latency}: no ranks lie between, or the machine may be busy. The plan says what was "
            "measured.",
            stacklevel=4,
        )
    _, choice, account = min(tried, key=itemgetter(0))
    taken = round(1e9 * cast("float", choice.seconds))
    if limit is not None and taken > (1 + _ALLOWED) * limit:
        share = taken / watch.dense_nanoseconds
        way_out = (
            f"Use at least {share:.4f}" if share < 1 else "None is faster than the dense one; limit the flops instead"
        )
        raise BudgetError(
            f"latency {limit / 1e6:.4g} ms is out of reach: in {len(tried)} timings the fastest network took "
            f"{taken / 1e6:.4g} ms, the dense one {watch.dense_nanoseconds / 1e6:.4g} ms. {way_out}, or try again "
            "while the machine is idle."
        )
    return choice, account
