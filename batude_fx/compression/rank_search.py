"""From judged sites to ranks under a budget; where time is limited, the network itself is timed until it meets it."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replaced

from torch import nn

from batude_fx.budget import knapsack, rank_options
from batude_fx.budget.cost_limits import CostLimits
from batude_fx.errors import UnsupportedError
from batude_fx.graph.sites import ConvSite
from batude_fx.tucker.dense_layers import canonical_bias, canonical_weight
from batude_fx.tucker.modules import TuckerModule, tucker_conv
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import Spectrum


@dataclass(frozen=True)
class SiteCandidate:
    """What planning knows of a site that can be replaced.

    Attributes:
        site: The site.
        options: The ranks it may get.
        spectrum: Its factors at all of them.
    """

    site: ConvSite
    options: rank_options.RankOptions
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
class RankPlan:
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


def choose_ranks(candidates: Mapping[str, SiteCandidate], account: CostLimits) -> RankPlan:
    """Ranks and losses of the sites that are replaced, and what the whole compressed model costs."""
    options = [candidate.options for candidate in candidates.values()]
    rows = knapsack.allocate(options, account.capacity(options))
    ranks: dict[str, Ranks] = {}
    losses: dict[str, float] = {}
    total = account.fixed
    for name, option, row in zip(candidates, options, rows, strict=True):
        total = total + option.costs[row]
        if not option.is_dense[row]:
            rank_out, rank_in = option.ranks[row].tolist()
            ranks[name], losses[name] = Ranks(rank_out, rank_in), float(option.losses[row])
    flops, params, *nanoseconds = total.tolist()
    seconds = account.taken(nanoseconds[0]) / 1e9 if nanoseconds else None
    return RankPlan(ranks, losses, flops, params, seconds)
