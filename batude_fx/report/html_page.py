"""`report.html`: what was done to a saved network, to be looked at from disk in any browser.

The page holds everything it shows: no script, no font and no picture from elsewhere.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from batude_fx.errors import SavedModelError
from batude_fx.graph.site_table import describe_convolution, describe_ranks
from batude_fx.report import record as records
from batude_fx.report import sweep_points
from batude_fx.report.record import Record
from batude_fx.support.atomic_files import atomic_file
from batude_fx.support.numbers import human, milliseconds, percent

PAGE = "report.html"
_TITLES = {
    "flops": "Flops of every convolution, before and after",
    "spectra": "What each rank leaves, and where it was cut",
    "sweep": "Other budgets of the same network",
    "ranks": "Ranks over the rounds of training",
    "residuals": "Residuals and flops over the rounds of training",
}


def write(record: Record, folder: Path) -> None:
    """Write the page; a `sweep.json` in the folder is shown, too.

    Raises:
        SavedModelError: When that is broken.
    """
    page = render(record, sweep_points.read(folder))
    with atomic_file(folder / PAGE) as text:
        text.write_text(page, encoding="utf-8")


def check_network(folder: Path, record: Record) -> None:
    """Refuse to show a sweep of a network in the report of another one.

    Raises:
        SavedModelError: When the folder has such a report, or a broken one.
    """
    known = records.read(folder)
    if known and not _same_original(known, record):
        raise SavedModelError(
            f"{folder} holds a report of another network: {known.model}, whose original has {known.dense_flops:,} "
            f"flops, and this one has {record.dense_flops:,} or other weights. Give another folder."
        )


def replace_report(record: Record | None, folder: Path) -> None:
    """Take away what a folder tells of the network before, and tell of this one; a sweep of the same original stays."""
    try:
        known = records.read(folder)
    except SavedModelError:
        known = None
    if not (record and known and _same_original(record, known)):
        (folder / sweep_points.FILE).unlink(missing_ok=True)
    for name in (records.FILE, PAGE, *(f"{name}.png" for name in _TITLES)):
        (folder / name).unlink(missing_ok=True)
    if record:
        records.write(record, folder)
        write(record, folder)


def _same_original(one: Record, other: Record) -> bool:
    same_weights = one.weights == other.weights or None in {one.weights, other.weights}
    return same_weights and (one.dense_flops, one.dense_params) == (other.dense_flops, other.dense_params)


def write_pages(folder: Path) -> list[Path]:
    """Write the page anew, and every picture as PNG.

    Returns:
        The files written.

    Raises:
        SavedModelError: When the folder holds neither a report nor a sweep, or one of them is broken.
    """
    from batude_fx.report.figures import pictures, sweep_picture, write_png

    record, points = records.read(folder), sweep_points.read(folder)
    if record:
        write(record, folder)
        drawn = pictures(record, points)
    elif points:
        drawn = {"sweep": sweep_picture(points)}
    else:
        raise SavedModelError(
            f"{folder} holds no {records.FILE} and no {sweep_points.FILE}; give a folder that batude-fx compress, "
            "train or sweep wrote."
        )
    paths = {name: folder / f"{name}.png" for name in drawn}
    for name, figure in drawn.items():
        write_png(figure, paths[name])
    return [*([folder / PAGE] if record else []), *paths.values()]


def render(record: Record, points: Sequence[sweep_points.Point] = ()) -> str:
    """The page."""
    from batude_fx.report.figures import pictures, svg

    drawn = {name: base64.b64encode(svg(figure)).decode() for name, figure in pictures(record, points).items()}
    environment = Environment(
        loader=PackageLoader("batude_fx.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"human": human}
    return environment.get_template(PAGE).render(
        record=record, points=points, pictures=drawn, titles=_TITLES, percent=percent, milliseconds=milliseconds,
        rows=_rows(record),
        replaced=sum(site.ranks is not None for site in record.sites),
    )  # fmt: skip


def _rows(record: Record) -> list[dict[str, Any]]:
    return [
        {"site": site, "convolution": describe_convolution(site), "ranks": describe_ranks(site.ranks)}
        for site in record.sites
    ]
