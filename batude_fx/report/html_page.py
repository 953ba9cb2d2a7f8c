"""The report of a compressed network as a page, `report.html`, which any browser shows from disk.

Everything it shows is in this one file: it has no scripts, and loads no fonts and no pictures.
"""

import base64
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from batude_fx.errors import SavedModelError, printable
from batude_fx.graph.site_table import describe_convolution, describe_ranks
from batude_fx.report import record as records
from batude_fx.report import sweep_points
from batude_fx.report.record import SHARES, Record, SiteSensitivity
from batude_fx.support.atomic_files import newest, write_text
from batude_fx.support.numbers import human, milliseconds, percent

PAGE = "report.html"
_TITLES = {
    "flops": "Flops of each convolution before and after compression",
    "spectra": "Predicted loss at each rank, and the chosen ranks",
    "sweep": "Accuracy at other budgets",
    "sensitivity": "Layers that the network depends on: what cutting each of them alone costs",
    "search": "Networks that were tried, and the quality that was asked for",
    "ranks": "Ranks during training",
    "residuals": "Residuals of BC-ADL and flops during training",
}
FILES = (records.FILE, PAGE, sweep_points.FILE, *(f"{name}.png" for name in _TITLES))
"""Names of all files that belong to a report."""


def write(record: Record, folder: Path) -> None:
    """Write the page into a folder, with the sweep of the folder if there is one.

    Raises:
        SavedModelError: When the folder's `sweep.json` is broken.
    """
    write_text(folder / PAGE, render(record, sweep_points.read(folder)))


def check_network(folder: Path, record: Record) -> None:
    """Refuse a folder with the report of another network, as the report would show the sweep of this one.

    Raises:
        SavedModelError: When the folder holds such a report, or a broken one.
    """
    present = records.read(folder)
    if present and not _same_original(present, record):
        raise SavedModelError(
            f"{folder} holds a report of another network: {present.model}, whose original has {present.dense_flops:,} "
            f"flops, and this one has {record.dense_flops:,} or other weights. Give another folder."
        )


def write_successor(record: Record, folder: Path, previous: Path) -> None:
    """Write the report of a network into a folder, with the sweep of the network that it takes the place of.

    The sweep is left out if the two were not compressed from the same original.

    Args:
        record: How the network was compressed.
        folder: Where its report is written.
        previous: The folder of the network before it.
    """
    with suppress(SavedModelError):  # a broken report or sweep is not taken over
        predecessor, points = records.read(previous), sweep_points.read(previous)
        if points and predecessor and _same_original(record, predecessor):
            sweep_points.write(points, folder)
    records.write(record, folder)
    write(record, folder)


def _same_original(a: Record, b: Record) -> bool:
    """Return whether two networks were compressed from the same one, as far as their records show."""
    same_weights = a.weights == b.weights or None in {a.weights, b.weights}
    return same_weights and (a.dense_flops, a.dense_params) == (b.dense_flops, b.dense_params)


def check_report(folder: Path) -> Record:
    """Return the record of a network's folder; refuse a folder without one.

    Raises:
        SavedModelError: When the folder holds no report, or a broken one.
    """
    record = records.read(folder)
    if record is None:
        raise SavedModelError(f"{folder} holds no {records.FILE}; give a folder that batude-fx compress wrote.")
    return record


def add_sensitivity(folder: Path, sites: tuple[SiteSensitivity, ...]) -> list[Path]:
    """Add what each site costs to the report of a network, and write its page and its pictures again.

    Args:
        folder: The folder of the network.
        sites: One entry per site.

    Returns:
        The files that were written.

    Raises:
        SavedModelError: When the folder holds no report, or a broken one.
    """
    record = check_report(folder)
    records.write(record.model_copy(update={"sensitivity": sites}), newest(folder))
    return write_pages(folder)


def write_pages(folder: Path) -> list[Path]:
    """Write the page again, and every picture as a PNG file.

    Returns:
        The files that were written.

    Raises:
        SavedModelError: When the folder holds neither a report nor a sweep, or one of them is broken.
    """
    from batude_fx.report.figures import pictures, sweep_picture, write_png

    folder = newest(folder)
    record, points = records.read(folder), sweep_points.read(folder)
    if record:
        write(record, folder)
        figures = pictures(record, points)
    elif points:
        figures = {"sweep": sweep_picture(points)}
    else:
        raise SavedModelError(
            f"{folder} holds no {records.FILE} and no {sweep_points.FILE}; give a folder that batude-fx compress, "
            "train or sweep wrote."
        )
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        write_png(figure, paths[name])
    return [*([folder / PAGE] if record else []), *paths.values()]


def render(record: Record, points: Sequence[sweep_points.Point] = ()) -> str:
    """Return the page as HTML."""
    from batude_fx.report.figures import pictures, svg

    images = {name: base64.b64encode(svg(figure)).decode() for name, figure in pictures(record, points).items()}
    environment = Environment(
        loader=PackageLoader("batude_fx.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: printable(value) if isinstance(value, str) else value,
    )  # fmt: skip
    environment.filters |= {"human": human}
    return environment.get_template(PAGE).render(
        record=record, points=points, pictures=images, titles=_TITLES, percent=percent, milliseconds=milliseconds,
        rows=_rows(record), shares=SHARES,
        replaced=sum(site.ranks is not None for site in record.sites),
    )  # fmt: skip


def _rows(record: Record) -> list[dict[str, Any]]:
    return [
        {"site": site, "convolution": describe_convolution(site), "ranks": describe_ranks(site.ranks)}
        for site in record.sites
    ]
