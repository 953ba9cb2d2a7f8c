"""From the metrics of all sites to their ranks: every site is decomposed once, then a knapsack chooses its ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from batude_fx.budget.cost_limits import CostLimits
from batude_fx.budget.knapsack import allocate
from batude_fx.budget.rank_options import FLOPS, NANOSECONDS, PARAMS, RankOptions
from batude_fx.errors import UnsupportedError
from batude_fx.graph.sites import ConvSite
from batude_fx.support.progress import track
from batude_fx.tucker.dense_layers import canonical_bias, canonical_weight
from batude_fx.tucker.metric import Metric
from batude_fx.tucker.modules import TuckerModule, tucker_conv
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import Spectrum, metric_spectrum, weight_spectrum


@dataclass(frozen=True)
class SiteCandidate:
    """A site that can be replaced, with everything that planning needs of it.

    Attributes:
        site: The convolution.
        options: The ranks it may get, with their costs and losses.
        spectrum: Its factors at all ranks.
    """

    site: ConvSite
    options: RankOptions
    spectrum: Spectrum

    def replacement(self, layer: nn.Module, ranks: Ranks, *, with_bias: bool) -> TuckerModule:
        """Build the Tucker form of the site's layer.

        Args:
            layer: The layer of the model that was planned for.
            ranks: One of the options.
            with_bias: Whether to add a bias where the layer has none.

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
        return tucker_conv(layer, ranks, replace(self.spectrum.factors(weight, ranks), bias=bias))


@dataclass(frozen=True)
class RankPlan:
    """Ranks of all sites, and what the compressed network costs with them.

    Attributes:
        ranks: Site name to its ranks, for the sites that are replaced.
        losses: Site name to predicted loss, for the same sites.
        flops: Multiply-adds of the whole compressed network.
        params: Parameters of the whole compressed network.
        site_time: Nanoseconds that the times of its sites and the time of all else add up to; None where nothing was
            timed.
        seconds: Wall time of one run, predicted or measured; None where nothing was timed.
    """

    ranks: Mapping[str, Ranks]
    losses: Mapping[str, float]
    flops: int
    params: int
    site_time: int | None
    seconds: float | None


def decompose_sites(
    model: nn.Module,
    sites: Mapping[str, ConvSite],
    options: Mapping[str, RankOptions],
    metrics: Mapping[str, Metric],
) -> dict[str, SiteCandidate]:
    """Decompose the weight of every site, in its metric where it has one, and judge its options by that.

    Args:
        model: Holds the layers.
        sites: Name to site, all of them replaceable.
        options: Site name to what the site can be.
        metrics: Site name to metric; a site without one is judged by its weight alone.
    """
    return {
        name: _decompose(model.get_submodule(name), sites[name], options[name], metrics.get(name))
        for name in track(list(sites), "decomposing")
    }


def choose_ranks(candidates: Mapping[str, SiteCandidate], limits: CostLimits) -> RankPlan:
    """Choose the ranks that lose least within the limits.

    Raises:
        BudgetError: No choice of ranks fits.
    """
    options = [candidate.options for candidate in candidates.values()]
    rows = allocate(options, limits.capacity(options))
    ranks: dict[str, Ranks] = {}
    losses: dict[str, float] = {}
    costs = limits.fixed
    for name, option, row in zip(candidates, options, rows, strict=True):
        costs = costs + option.costs[row]
        if not option.is_dense[row]:
            rank_out, rank_in = option.ranks[row].tolist()
            ranks[name], losses[name] = Ranks(rank_out, rank_in), float(option.losses[row])
    site_time = int(costs[NANOSECONDS]) if len(costs) > NANOSECONDS else None
    seconds = None if site_time is None else limits.latency_model.predict(site_time) / 1e9
    return RankPlan(ranks, losses, int(costs[FLOPS]), int(costs[PARAMS]), site_time, seconds)


def _decompose(layer: nn.Module, site: ConvSite, options: RankOptions, metric: Metric | None) -> SiteCandidate:
    if metric is not None:
        spectrum = metric_spectrum(metric)
    else:
        spectrum = weight_spectrum(canonical_weight(layer), pointwise=site.is_pointwise)
    return SiteCandidate(site, options.with_losses(spectrum.loss()), spectrum)
