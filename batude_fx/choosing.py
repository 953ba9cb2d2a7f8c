"""From judged sites to ranks under a budget; where time is limited, the network itself is timed until it meets it."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as replaced
from itertools import product
from operator import itemgetter
from typing import Literal, cast

from torch import nn

from batude_fx import allocation
from batude_fx.budget import Budget
from batude_fx.capacity import Account
from batude_fx.errors import BudgetError, SelectionError, UnsupportedError
from batude_fx.handlers import canonical_bias, canonical_weight
from batude_fx.latency import Stopwatch
from batude_fx.modules import TuckerModule, tucker_conv
from batude_fx.progress import track
from batude_fx.sites import ConvSite, Ranks
from batude_fx.spectra import Spectrum

_ROUNDS, _CLOSE, _ALLOWED = 6, 0.02, 0.05  # to meet a latency: trials, when to stop, how much above is bearable


@dataclass(frozen=True)
class Candidate:
    """What planning knows of a site that can be replaced.

    Attributes:
        site: The site.
        options: The ranks it may get.
        spectrum: Its factors at all of them.
    """

    site: ConvSite
    options: allocation.Options
    spectrum: Spectrum

    def replacement(self, layer: nn.Module, ranks: Ranks, *, with_bias: bool) -> TuckerModule:
        """The Tucker form of the site's layer.

        Args:
            layer: That of the model that was planned for.
            ranks: Among the options.
            with_bias: Whether it has a bias even where the layer has none.

        Raises:
            UnsupportedError: The layer has another shape, dtype or device than in the plan.
        """
        weight, bias = canonical_weight(layer), canonical_bias(layer)
        site = self.site
        planned = (site.groups, site.group_out_channels, site.group_in_channels, *site.kernel_size)
        if weight.shape != planned:
            raise UnsupportedError(
                f"{site.name} has a weight {tuple(weight.shape)} (groups, out, in, kernel), the plan was made for "
                f"{planned}; apply the plan to its own model."
            )
        here, there = (weight.dtype, weight.device), (self.spectrum.dtype, self.spectrum.device)
        if here != there:
            raise UnsupportedError(
                f"{site.name} is {here[0]} on {here[1]}, the plan was made for {there[0]} on {there[1]}; apply it to "
                "its own model as it was, then convert or move the result."
            )
        if bias is None and with_bias:
            bias = weight.new_zeros(weight.shape[:2].numel())
        return tucker_conv(layer, ranks, replaced(self.spectrum.factors(weight, ranks), bias=bias))


@dataclass(frozen=True)
class Choice:
    """What a plan decides.

    Attributes:
        ranks: Site name to its ranks, for the sites that are replaced.
        losses: Site name to predicted loss, for the same sites.
        flops: Of the whole compressed model.
        params: Likewise.
        seconds: Likewise, of one run; None where nothing was timed.
    """

    ranks: Mapping[str, Ranks]
    losses: Mapping[str, float]
    flops: int
    params: int
    seconds: float | None


def choose(candidates: Mapping[str, Candidate], account: Account) -> Choice:
    """Ranks and losses of the sites that are replaced, and what the whole compressed model costs."""
    options = [candidate.options for candidate in candidates.values()]
    rows = allocation.allocate(options, account.capacity(options))
    ranks: dict[str, Ranks] = {}
    losses: dict[str, float] = {}
    total = account.fixed
    for name, option, row in zip(candidates, options, rows, strict=True):
        total = total + option.costs[row]
        if (option.costs[row] != option.dense).any():
            rank_out, rank_in = option.ranks[row].tolist()
            ranks[name], losses[name] = Ranks(rank_out, rank_in), float(option.losses[row])
    flops, params, *nanoseconds = total.tolist()
    seconds = account.taken(nanoseconds[0]) / 1e9 if nanoseconds else None
    return Choice(ranks, losses, flops, params, seconds)


def timed(
    count: Callable[[int], tuple[dict[str, allocation.Options], Account]],
    budget: Budget,
    watch: Stopwatch,
    round_to: int | Literal["auto"],
) -> tuple[dict[str, allocation.Options], Account]:
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
    count: Callable[[int], tuple[dict[str, allocation.Options], Account]],
    budget: Budget,
    watch: Stopwatch,
) -> tuple[dict[str, allocation.Options], Account]:
    only_faster, multiple = way
    options, account = count(multiple)
    options = watch.priced(options, only_faster=only_faster)
    account = Account.of(options.values(), account.budget, (*account.dense, watch.dense_nanoseconds), multiple)
    account.capacity(options.values())  # where flops or parameters are out of reach, the network is not timed
    account = replaced(account, budget=budget)
    try:
        account.capacity(options.values())
    except BudgetError:  # by the times of the sites; the network's own may be shorter
        rows = {name: int(one.costs[:, 2].argmin()) for name, one in options.items()}
        fastest = {
            name: Ranks(*options[name].ranks[row].tolist())
            for name, row in rows.items()
            if (options[name].costs[row] != options[name].dense).any()
        }
        foreseen = int(account.fixed[2]) + sum(int(options[name].costs[row, 2]) for name, row in rows.items())
        account = account.with_timed(foreseen, watch.compare(fastest))
        account.capacity(options.values())
    return options, account


def settled(
    choice: Choice, watch: Stopwatch, candidates: Mapping[str, Candidate], account: Account
) -> tuple[Choice, Account]:
    """Time the whole network with the chosen ranks, and choose anew with what that tells, until it meets the limit.

    Returns:
        The choice that comes closest to the limit, from below where one does, with its measured time; and the account
        that predicts it right.

    Raises:
        BudgetError: No choice comes close to the limit.
    """
    limit = account.budget.limits(*account.dense).nanoseconds
    tried: list[tuple[tuple[bool, int], Choice, Account]] = []
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
            other = choose(candidates, account)
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
