"""The pictures of a report, drawn by matplotlib. Their colours can be told apart with colour blindness."""

import io
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from batude_fx.errors import printable
from batude_fx.quality.quality import Search
from batude_fx.report.record import Record, RoundRecord, SiteRecord, SiteSensitivity
from batude_fx.report.sweep_points import Point
from batude_fx.support.arrays import Floats, Integers
from batude_fx.support.atomic_files import atomic_file

# From M. Okabe and K. Ito, "Color Universal Design", 2008, but for the grey.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#BBBBBB"
_VERMILION = "#D55E00"
_ROW_HEIGHT = 0.17  # inches per site
_MOST_ROWS = 300  # sites in a picture
_LONGEST_NAME = 60  # characters of a site's name, the last ones
_SMALLEST_LOSS = 1e-4  # share of the loss below which the spectra show no difference
_SPECTRUM_COLUMNS = 65
_MODE_TITLES = "output ranks", "input ranks"  # of mode 0 and of mode 1
Pictures = dict[str, Figure]


def pictures(record: Record, points: Sequence[Point] = ()) -> Pictures:
    """Draw all pictures for which a record and a sweep have numbers; the keys are names of files without suffix.

    Of a network with very many sites, the most expensive ones are shown.
    """
    expensive = sorted(record.sites, key=attrgetter("dense_flops"), reverse=True)[:_MOST_ROWS]
    names = {site.name for site in expensive}
    sites = [site for site in record.sites if site.name in names]
    figures = {"flops": _flops(sites)}
    if any(site.spectrum_out for site in sites):
        figures["spectra"] = _spectra([site for site in sites if site.spectrum_out])
    if record.training and record.training.rounds:
        figures["ranks"] = _ranks(sites, record.training.rounds)
        figures["residuals"] = _residuals(record.training.rounds)
    if measured := [site for site in record.sensitivity if site.measured is not None and site.predicted[1] is not None]:
        figures["sensitivity"] = _sensitivity(measured)
    if points:
        figures["sweep"] = sweep_picture(points)
    if record.search and record.search.trials:
        figures["search"] = _search(record.search, record.dense_flops)
    return figures


def sweep_picture(points: Sequence[Point]) -> Figure:
    """Draw agreement and accuracy against flops and against milliseconds."""
    figure, (left, right) = _figure(9, 3.8, columns=2, sharey=True)
    curves = {"agreement with the original": [point.agreement for point in points]}
    if points[0].top1 is not None and points[0].top5 is not None:
        curves["top-1 accuracy"] = [point.top1 or 0.0 for point in points]
        curves["top-5 accuracy"] = [point.top5 or 0.0 for point in points]
    costs = (left, [point.flops for point in points]), (right, [point.milliseconds for point in points])
    for axes, x in costs:
        for (label, y), colour, marker in zip(curves.items(), (_BLUE, _ORANGE, _GREEN), "os^", strict=False):
            axes.plot(x, y, color=colour, marker=marker, label=label)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    left.xaxis.set_major_formatter(EngFormatter(sep=" "))
    left.set_xlabel("flops (multiply-adds per image)")
    right.set_xlabel("milliseconds per image, batch 1")
    left.set_ylabel("share of images")
    left.legend()
    return figure


def _search(search: Search, dense_flops: int) -> Figure:
    """Draw what each network of a search reached against its share of the flops, and what was asked for."""
    figure, (axes,) = _figure(6, 3.8)
    trials = sorted(search.trials, key=attrgetter("flops"))
    shares = [trial.flops / dense_flops for trial in trials]
    axes.plot(shares, [trial.bound for trial in trials], color=_BLUE, marker="o", label="counts")
    if any(trial.value != trial.bound for trial in trials):
        axes.plot(shares, [trial.value for trial in trials], color=_GREY, marker="s", label="measured")
    axes.axhline(search.least, color=_VERMILION, linestyle="--", label="asked for")
    axes.set_xlabel("share of the flops")
    axes.set_ylabel("score" if search.target == "max_drop" else search.target)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _sensitivity(sites: Sequence[SiteSensitivity]) -> Figure:
    """Draw the predicted and the measured cost of cutting each site alone to half of its flops, each over its mean."""
    figure, (axes,) = _figure(9, 1.2 + 2 * _ROW_HEIGHT * len(sites))
    rows = np.arange(len(sites))
    for label, colour, shift, values in (
        ("predicted", _BLUE, -0.2, [site.predicted[1] or 0.0 for site in sites]),
        ("measured", _ORANGE, 0.2, [site.measured or 0.0 for site in sites]),
    ):
        mean = sum(values) / len(values) or 1.0
        axes.barh(rows + shift, [value / mean for value in values], height=0.4, color=colour, label=label)
    names = [printable(site.name[-_LONGEST_NAME:]) for site in sites]
    axes.set_yticks(rows, names, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("cost of cutting this site alone to half of its flops, relative to the mean of the sites shown")
    axes.legend()
    return figure


def write_png(figure: Figure, path: Path) -> None:
    """Write a picture as a PNG file, completely or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def svg(figure: Figure) -> bytes:
    """Return a picture as SVG: the same bytes every time, and with text that a browser can select."""
    file = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "batude_fx"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _flops(sites: Sequence[SiteRecord]) -> Figure:
    """Draw a bar per site: its flops after compression before those of the dense layer."""
    figure, (axes,) = _figure(9, 1.2 + _ROW_HEIGHT * len(sites))
    rows = np.arange(len(sites))
    axes.barh(rows, [site.dense_flops for site in sites], height=0.8, color=_GREY, label="original")
    axes.barh(rows, [site.flops for site in sites], height=0.5, color=_BLUE, label="compressed")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("flops (multiply-adds per image)")
    axes.margins(y=0.5 / max(1, len(sites)))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2)
    _name_rows(axes, sites)
    return figure


def _spectra(sites: Sequence[SiteRecord]) -> Figure:
    """Draw a heat map per mode: a row per site, the rank from left to right, the predicted loss as the colour."""
    figure, mode_axes = _figure(9, 1.6 + _ROW_HEIGHT * len(sites), columns=2, sharey=True)
    colours = ScalarMappable(LogNorm(_SMALLEST_LOSS, 1), "cividis")
    full_ranks = _full_ranks(sites)
    for mode, (axes, title) in enumerate(zip(mode_axes, _MODE_TITLES, strict=True)):
        spectra = [(site.spectrum_out, site.spectrum_in)[mode] for site in sites]
        axes.imshow(
            np.maximum([_resample(spectrum) for spectrum in spectra], _SMALLEST_LOSS), norm=colours.norm,
            cmap=colours.cmap, aspect="auto", extent=(0, 1, len(sites) - 0.5, -0.5), interpolation="none",
        )  # fmt: skip
        for row, site in enumerate(sites):
            if not site.ranks or not spectra[row] or site.ranks[mode] == full_ranks[row, mode]:
                continue
            x = site.ranks[mode] / full_ranks[row, mode]
            axes.plot([x, x], [row - 0.5, row + 0.5], color="white", linewidth=3)
            axes.plot([x, x], [row - 0.5, row + 0.5], color=_VERMILION, linewidth=1.5)
        axes.set_title(title)
        axes.set_xlabel("rank / channels; orange: the chosen rank")
    _name_rows(mode_axes[0], sites)
    figure.colorbar(colours, ax=mode_axes, label="predicted loss at a rank / at rank 0")
    return figure


def _full_ranks(sites: Sequence[SiteRecord]) -> Integers:
    """Return the output and input channels per group of all sites, (sites, 2)."""
    return np.array([[site.out_channels // site.groups, site.in_channels // site.groups] for site in sites])


def _resample(spectrum: Sequence[float] | None) -> Floats:
    """Interpolate a spectrum at the columns of a heat map, (columns,); NaN, which stays blank, where there is none."""
    if not spectrum:
        return np.full(_SPECTRUM_COLUMNS, np.nan)
    columns = np.linspace(0, 1, _SPECTRUM_COLUMNS)
    resampled: Floats = np.interp(columns, np.linspace(0, 1, len(spectrum)), spectrum)
    return resampled


def _ranks(all_sites: Sequence[SiteRecord], rounds: Sequence[RoundRecord]) -> Figure:
    """Draw a heat map per mode: a row per site, the rounds of training from left to right, the rank as the colour."""
    sites = [site for site in all_sites if site.name in rounds[0].ranks]
    full_ranks = _full_ranks(sites)
    ranks = np.array(
        [[record.ranks[site.name] or full_ranks[row] for row, site in enumerate(sites)] for record in rounds]
    )  # (rounds, sites, 2)
    figure, mode_axes = _figure(9, 1.6 + _ROW_HEIGHT * len(sites), columns=2, sharey=True)
    colours = ScalarMappable(Normalize(0, 1), "cividis")
    for mode, (axes, title) in enumerate(zip(mode_axes, _MODE_TITLES, strict=True)):
        shares = (ranks / full_ranks)[:, :, mode].T  # (sites, rounds)
        axes.imshow(shares, norm=colours.norm, cmap=colours.cmap, aspect="auto", interpolation="none")
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_rows(mode_axes[0], sites)
    figure.colorbar(colours, ax=mode_axes, label="rank / channels")
    return figure


def _residuals(rounds: Sequence[RoundRecord]) -> Figure:
    """Draw the residuals of BC-ADL, and the flops of the ranks, over the rounds of training."""
    figure, (left, right) = _figure(9, 3.2, columns=2)
    numbers = [record.round for record in rounds]
    primal, dual = [record.primal for record in rounds], [record.dual for record in rounds]
    left.plot(numbers, primal, color=_BLUE, marker="o", label="primal residual")
    left.plot(numbers, dual, color=_ORANGE, marker="s", label="dual residual")
    left.set_ylabel("relative to the weights' norm")
    left.legend()
    right.plot(numbers, [record.keep for record in rounds], color=_GREEN, marker="^")
    right.set_ylabel("share of flops that the ranks need")
    right.set_ylim(0, 1.05)
    for axes in (left, right):
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return figure


def _figure(width: float, height: float, *, columns: int = 1, sharey: bool = False) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]


def _name_rows(axes: Any, sites: Sequence[SiteRecord]) -> None:  # noqa: ANN401 - matplotlib's, shared or not
    names = [printable(site.name[-_LONGEST_NAME:]) for site in sites]
    axes.set_yticks(range(len(sites)), names, fontsize=7, parse_math=False)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
