"""What each site alone costs when it is cut: as the metric predicts, and as it is measured for the expensive ones.

It tells which layers a network depends on, and how far the predictions, by which ranks are chosen, can be trusted.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

from batude_fx.budget.rank_options import FLOPS, RankOptions
from batude_fx.compression.rank_search import SiteCandidate
from batude_fx.graph.flops import dense_cost
from batude_fx.quality.quality import Quality
from batude_fx.report.record import SHARES, SiteSensitivity
from batude_fx.support.arrays import Floats
from batude_fx.support.numbers import human
from batude_fx.support.progress import track
from batude_fx.support.tables import ShowsTable, add_row, new_table, set_caption
from batude_fx.tucker.ranks import Ranks

if TYPE_CHECKING:
    from rich.table import Table

_LEAST_FOR_CORRELATION = 3


@dataclass(frozen=True)
class Sensitivity(ShowsTable):
    """The sensitivity of all sites that can be replaced, the most expensive ones first; it prints as a table.

    Attributes:
        model_name: Class of the model.
        sites: One entry per site.
    """

    model_name: str
    sites: tuple[SiteSensitivity, ...]

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's rank correlation of predicted and measured; None for fewer than three sites, or equal values.

        Source: C. Spearman, "The Proof and Measurement of Association between Two Things", American Journal of
        Psychology 15, 1904.
        """
        pairs = [
            (site.predicted[1], site.measured)
            for site in self.sites
            if site.predicted[1] is not None and site.measured is not None
        ]
        if len(pairs) < _LEAST_FOR_CORRELATION:
            return None
        predicted, measured = (_places(values) for values in zip(*pairs, strict=True))
        if not (predicted.std() and measured.std()):
            return None
        return float(np.atleast_2d(np.corrcoef(predicted, measured))[0, 1])

    def _table(self) -> "Table":
        return sensitivity_table(self)


def _places(values: Iterable[float | None]) -> Floats:
    """Return the places of values in their order; equal values share the mean of theirs."""
    numbers = np.array(list(values), np.float64)
    ordered = np.sort(numbers)
    places: Floats = (np.searchsorted(ordered, numbers, "left") + np.searchsorted(ordered, numbers, "right")) / 2
    return places


def measure_sensitivity(
    model_name: str,
    candidates: Mapping[str, SiteCandidate],
    quality_with: Callable[[Mapping[str, Ranks]], Quality | None] | None,
    *,
    measured: int,
) -> Sensitivity:
    """Predict what every site costs when it is cut, and measure it for the most expensive ones.

    Args:
        model_name: Class of the model.
        candidates: Site name to the site with its options.
        quality_with: Returns the quality of the network with some ranks; None if no images are held back.
        measured: Number of sites to measure.
    """
    order = sorted(candidates, key=lambda name: dense_cost(candidates[name].site)[0], reverse=True)
    cuts = {name: [_cut(candidates[name].options, share) for share in SHARES] for name in order}
    to_measure = [name for name in order if cuts[name][1]][:measured] if quality_with else []
    errors = {}
    for name in track(to_measure, "measuring sites"):
        cut = cuts[name][1]
        quality = quality_with({name: cut.ranks}) if quality_with and cut else None
        errors[name] = quality.distance if quality else None
    return Sensitivity(
        model_name,
        tuple(
            SiteSensitivity(
                name=name,
                flops=dense_cost(candidates[name].site)[0],
                predicted=tuple(cut.loss if cut else None for cut in cuts[name]),
                ranks=astuple(half.ranks) if (half := cuts[name][1]) else None,
                measured=errors.get(name),
            )
            for name in order
        ),
    )


@dataclass(frozen=True)
class _Cut:
    """Ranks, and the loss that is predicted for them."""

    ranks: Ranks
    loss: float


def _cut(options: RankOptions, share: float) -> _Cut | None:
    """Return the best ranks within a share of a site's flops and their predicted loss; None where none are so small."""
    rows = np.flatnonzero(options.costs[:, FLOPS] <= share * options.dense[FLOPS])
    if not len(rows):
        return None
    best = rows[options.losses[rows].argmin()]
    return _Cut(Ranks(*map(int, options.ranks[best])), float(options.losses[best]))


def sensitivity_table(sensitivity: Sensitivity) -> "Table":
    """Return the table of all sites."""
    columns = (f"at {share:g}" for share in SHARES)
    table = new_table("site", "flops", *columns, "measured", title=f"{sensitivity.model_name}: each site cut alone")
    for site in sensitivity.sites:
        numbers = (*site.predicted, site.measured)
        add_row(table, site.name, human(site.flops), *("" if number is None else f"{number:.2g}" for number in numbers))
    correlation = sensitivity.rank_correlation
    measured = "Nothing was measured, as no images were held back."
    if any(site.measured is not None for site in sensitivity.sites):
        measured = (
            "Measured was what the site costs at 0.5: the mean KL divergence of a classifier, the relative error of "
            "other outputs."
        )
    trust = f" Spearman's rank correlation of the two at 0.5 is {correlation:.2f}." if correlation is not None else ""
    set_caption(
        table,
        f"Predicted loss of each site at shares of its flops, blank where no ranks are so small. {measured}{trust}",
    )
    return table
