"""The pictures of a report: the only place that draws. Colours survive colour blindness, axes have units."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from batude_fx.report.record import Record, SiteRecord
from batude_fx.report.sweep_points import Point
from batude_fx.support.arrays import Floats
from batude_fx.support.atomic_files import atomic_file

# Of M. Okabe and K. Ito, "Color Universal Design", 2008.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#BBBBBB"
_ROW = 0.17  # inches per site
_LEAST = 1e-4  # of a loss that a spectrum shows
_GRID = 65  # columns of a spectrum
Pictures = dict[str, Figure]


def pictures(record: Record, points: Sequence[Point] = ()) -> Pictures:
    """Every picture there is something to show in, by the name of its file."""
    made = {"flops": _flops(record.sites)}
    if any(site.spectrum_out for site in record.sites):
        made["spectra"] = _spectra([site for site in record.sites if site.spectrum_out])
    if record.training and record.training.rounds:
        made["ranks"] = _ranks(record)
        made["residuals"] = _residuals(record)
    if points:
        made["sweep"] = sweep_picture(points)
    return made


def sweep_picture(points: Sequence[Point]) -> Figure:
    """Agreement and accuracy against flops and against milliseconds."""
    figure, (left, right) = _figure(9, 3.8, columns=2, sharey=True)
    curves = {"agreement with the original": [point.agreement for point in points]}
    if points[0].top1 is not None and points[0].top5 is not None:
        curves["accuracy, first guess"] = [point.top1 or 0.0 for point in points]
        curves["accuracy, first five"] = [point.top5 or 0.0 for point in points]
    places = (left, [point.flops for point in points]), (right, [point.milliseconds for point in points])
    for axes, x in places:
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


def write_png(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def svg(figure: Figure) -> bytes:
    """A picture as SVG, the same bytes every time; its text is text."""
    written = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "batude_fx"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _flops(sites: Sequence[SiteRecord]) -> Figure:
    figure, (axes,) = _figure(9, 1.2 + _ROW * len(sites))
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
    figure, both = _figure(9, 1.6 + _ROW * len(sites), columns=2, sharey=True)
    shades = ScalarMappable(LogNorm(_LEAST, 1), "cividis")
    grid = np.linspace(0, 1, _GRID)
    for mode, (axes, title) in enumerate(zip(both, ("output ranks", "input ranks"), strict=True)):
        curves = [(site.spectrum_out, site.spectrum_in)[mode] for site in sites]
        shown = np.array([_resampled(curve, grid) if curve else np.full(_GRID, np.nan) for curve in curves])
        axes.imshow(
            np.maximum(shown, _LEAST), norm=shades.norm, cmap=shades.cmap, aspect="auto",
            extent=(0, 1, len(sites) - 0.5, -0.5), interpolation="none",
        )  # fmt: skip
        full = [(site.out_channels // site.groups, site.in_channels // site.groups)[mode] for site in sites]
        for row, (site, channels) in enumerate(zip(sites, full, strict=True)):
            if not site.ranks or not curves[row] or site.ranks[mode] == channels:
                continue
            cut = site.ranks[mode] / channels
            axes.plot([cut, cut], [row - 0.5, row + 0.5], color="white", linewidth=3)
            axes.plot([cut, cut], [row - 0.5, row + 0.5], color="#D55E00", linewidth=1.5)
        axes.set_title(title)
        axes.set_xlabel("rank / channels; orange: the cut")
    _name_rows(both[0], sites)
    figure.colorbar(shades, ax=both, label="share of the loss that a rank leaves")
    return figure


def _resampled(curve: Sequence[float], grid: Floats) -> Floats:
    shown: Floats = np.interp(grid, np.linspace(0, 1, len(curve)), curve)
    return shown


def _ranks(record: Record) -> Figure:
    rounds = record.training.rounds if record.training else ()
    sites = [site for site in record.sites if site.name in rounds[0].ranks]
    full = np.array([[s.out_channels // s.groups, s.in_channels // s.groups] for s in sites])  # (sites, 2)
    ranks = np.array([[one.ranks[site.name] or full[row] for row, site in enumerate(sites)] for one in rounds])
    figure, both = _figure(9, 1.6 + _ROW * len(sites), columns=2, sharey=True)
    shades = ScalarMappable(Normalize(0, 1), "cividis")
    for mode, (axes, title) in enumerate(zip(both, ("output ranks", "input ranks"), strict=True)):
        shown = (ranks / full)[:, :, mode].T  # (sites, rounds)
        axes.imshow(shown, norm=shades.norm, cmap=shades.cmap, aspect="auto", interpolation="none")
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_rows(both[0], sites)
    figure.colorbar(shades, ax=both, label="rank / channels")
    return figure


def _residuals(record: Record) -> Figure:
    rounds = record.training.rounds if record.training else ()
    figure, (left, right) = _figure(9, 3.2, columns=2)
    x = [one.round for one in rounds]
    styles: Mapping[str, tuple[str, str]] = {"primal": (_BLUE, "o"), "dual": (_ORANGE, "s")}
    for name, (colour, marker) in styles.items():
        left.plot(x, [getattr(one, name) for one in rounds], color=colour, marker=marker, label=f"{name} residual")
    left.set_ylabel("relative to the weights' norm")
    left.legend()
    right.plot(x, [one.keep for one in rounds], color=_GREEN, marker="^")
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
    axes.set_yticks(range(len(sites)), [site.name for site in sites], fontsize=7, parse_math=False)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
