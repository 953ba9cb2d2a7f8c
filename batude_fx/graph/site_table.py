"""`Sites`, the tuple of the sites of a model that prints as a table, and the parts that other site tables share."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, Self

from batude_fx.graph.flops import dense_cost
from batude_fx.graph.sites import ConvSite
from batude_fx.support.numbers import human, percent
from batude_fx.support.tables import ShowsTable, add_row, new_table, set_caption

if TYPE_CHECKING:
    from rich.table import Table

_SITE_WIDTH = 22
_MOST_REASONS, _MENTIONED = 3, 0.05  # in a message: how many reasons, and from which share of the flops on
_MOST_NAMES = 3


class Convolution(Protocol):
    """The attributes that describe a convolution; `ConvSite` has them, and so has the record of a site in a report."""

    @property
    def kind(self) -> str: ...  # noqa: D102 - as in ConvSite
    @property
    def in_channels(self) -> int: ...  # noqa: D102
    @property
    def out_channels(self) -> int: ...  # noqa: D102
    @property
    def kernel_size(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def groups(self) -> int: ...  # noqa: D102


class Sites(ShowsTable, tuple[ConvSite, ...]):  # noqa: SLOT001 - Python gives tuples no slots but the empty ones
    """The sites that `discover` returns, as a tuple that prints as a table.

    Attributes:
        sizes_vary: Whether tensor sizes may depend on values, as where a detector selects boxes: an operation of the
            run has such a result, or the model has control flow that cannot be traced. Then networks of the same
            shapes but other weights may need different numbers of flops.
    """

    sizes_vary: bool

    def __new__(cls, sites: Iterable[ConvSite], *, sizes_vary: bool = False) -> Self:
        """Construct the tuple; its elements cannot be set in `__init__` any more."""
        self = super().__new__(cls, sites)
        self.sizes_vary = sizes_vary
        return self

    def replaceable(self) -> dict[str, ConvSite]:
        """Return the sites that can be replaced, by name."""
        return {site.name: site for site in self if site.skip_reason is None}

    def _table(self) -> "Table":
        return sites_table(self, "sites")


def sites_table(sites: Sequence[ConvSite], model_name: str) -> "Table":
    """Return the table of all sites of a model: sizes, cost, how each was found, and why some cannot be replaced."""
    table = new_site_table(model_name, sites, "flops", "params", "calls", "found")
    for site in sites:
        flops, params = dense_cost(site)
        add_site_row(table, site, human(flops), human(params), str(site.calls), site.found_by)
    eligible = [site for site in sites if site.skip_reason is None]
    set_caption(
        table,
        f"{len(eligible)} of {len(sites)} can be replaced. One multiply-add is one flop.{skip_notes(sites)}",
    )
    return table


def new_site_table(title: str, sites: Sequence[ConvSite], *columns: str) -> "Table":
    """Return a table without rows, with columns for the name of a site, its convolution, and the given numbers."""
    table = new_table(title=title, padding=(0, 1, 0, 0))
    longest = max((len(site.name) for site in sites), default=0)
    table.add_column("site", overflow="fold", min_width=min(longest, _SITE_WIDTH))
    table.add_column("convolution", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")  # a star that refers to the notes in the caption
    return table


def add_site_row(table: "Table", site: ConvSite, *cells: str) -> None:
    """Add the row of a site; a star marks one that cannot be replaced."""
    add_row(table, site.name, describe_convolution(site), *cells, "*" if site.skip_reason else "")


def skip_notes(sites: Iterable[ConvSite]) -> str:
    """Return the reasons why sites cannot be replaced, a line for each reason with its sites, for the caption."""
    return "".join(
        f"\n* {reason}: {_first_names([site.name for site in group])}"
        for reason, group in _sites_by_reason(sites).items()
    )


def dense_notes(sites: Sequence[ConvSite]) -> str:
    """Return the reasons that keep most flops dense, for the message that a budget is out of reach."""
    total = sum(dense_cost(site)[0] for site in sites)
    flops = {reason: sum(dense_cost(site)[0] for site in group) for reason, group in _sites_by_reason(sites).items()}
    largest = sorted(flops, key=lambda reason: flops[reason], reverse=True)[:_MOST_REASONS]
    notes = [
        f"{_first_names([site.name for site in _sites_by_reason(sites)[reason]])} ({percent(flops[reason], total)} of "
        f"the sites' flops): {reason}"
        for reason in largest
        if flops[reason] > _MENTIONED * total
    ]
    return f" Dense stay {'; '.join(notes)}." if notes else ""


def _sites_by_reason(sites: Iterable[ConvSite]) -> dict[str, list[ConvSite]]:
    groups: dict[str, list[ConvSite]] = {}
    for site in sites:
        if site.skip_reason:
            groups.setdefault(site.skip_reason, []).append(site)
    return groups


def describe_convolution(site: Convolution) -> str:
    """Describe a convolution in a few characters: "64 > 128 3x3", or "Conv1d 8 > 8 5 dw" where it is depthwise."""
    kernel = "x".join(map(str, site.kernel_size))
    groups = " dw" if site.groups == site.in_channels > 1 else f" /{site.groups}" if site.groups > 1 else ""
    kind = "" if site.kind == "Conv2d" else f"{site.kind} "
    return f"{kind}{site.in_channels} > {site.out_channels} {kernel}{groups}".rstrip()


def describe_ranks(ranks: tuple[int, int] | None) -> str:
    """Describe ranks in a few characters: "24 / 16", or "dense" for None."""
    return "{} / {}".format(*ranks) if ranks else "dense"


def _first_names(names: Sequence[str]) -> str:
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
