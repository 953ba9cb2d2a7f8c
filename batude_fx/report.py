"""Numbers and tables for people: the only place that formats them."""

from collections.abc import Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from batude_fx.flops import dense_cost, site_cost
from batude_fx.sites import ConvSite, Ranks

if TYPE_CHECKING:
    from batude_fx.compression import Plan

_WIDTH = 120


def human(count: float) -> str:
    """A count with three digits and a metric prefix: 4089184256 is "4.09 G"."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}"
    return f"{count:g} "


def percent(part: float, whole: float) -> str:
    """A share of a whole: "49.9 %"."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def plan_table(plan: "Plan") -> Table:
    """Every site of a plan with what it costs before and after, its ranks or the reason why it stays dense."""
    title = f"{plan.model_name}, calibration: {plan.calibration}"
    table = Table("site", "kind", "channels", "flops", "after", "ranks out/in", "loss", "why dense", title=title)
    for site in plan.sites:
        ranks = plan.ranks.get(site.name)
        dense, after = dense_cost(site)[0], site_cost(site, ranks)[0]
        table.add_row(
            site.name,
            _kind(site),
            f"{site.in_channels} > {site.out_channels}",
            human(dense),
            human(after) if ranks else "",
            _ranks(ranks),
            f"{plan.losses[site.name]:.2g}" if ranks else "",
            site.skip_reason or ("" if ranks else "keeps more than it costs"),
        )
    table.caption = (
        f"{human(plan.dense_flops)}FLOPs to {human(plan.flops)}FLOPs ({percent(plan.flops, plan.dense_flops)}), "
        f"{human(plan.dense_params)} to {human(plan.params)} parameters ({percent(plan.params, plan.dense_params)}); "
        f"{len(plan.ranks)} of {len(plan.sites)} sites replaced. One multiply-add is one flop."
    )
    return table


def sites_table(sites: Sequence[ConvSite], model_name: str) -> Table:
    """Every convolution of a model: sizes, cost, how it was found, and why it would stay dense."""
    table = Table("site", "kind", "channels", "flops", "params", "calls", "found by", "why dense", title=model_name)
    for site in sites:
        flops, params = dense_cost(site)
        table.add_row(
            site.name,
            _kind(site),
            f"{site.in_channels} > {site.out_channels}",
            human(flops),
            human(params),
            str(site.calls),
            site.found_by,
            site.skip_reason or "",
        )
    eligible = [site for site in sites if site.skip_reason is None]
    table.caption = f"{len(eligible)} of {len(sites)} can be replaced. One multiply-add is one flop."
    return table


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def as_text(table: Table) -> str:
    """The table as plain text, for `print` and log files."""
    text = StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue().rstrip()


def _kind(site: ConvSite) -> str:
    kernel = "x".join(map(str, site.kernel_size))
    groups = f" g{site.groups}" if site.groups > 1 else ""
    return f"{site.kind} {kernel}{groups}".rstrip()


def _ranks(ranks: Ranks | None) -> str:
    return f"{ranks.rank_out} / {ranks.rank_in}" if ranks else ""


def saved_table(folder: object, facts: dict[str, Any]) -> Table:
    """What a saved folder holds, and its Tucker modules."""
    saved = facts["model_args"]
    table = Table("site", "ranks out/in", title=f"{folder}: {saved['library'] or 'foreign'} {saved['base'] or ''}")
    for name, (rank_out, rank_in) in saved["ranks"].items():
        table.add_row(name, f"{rank_out} / {rank_in}")
    counted = f"{human(facts['flops'])}FLOPs, {human(facts['params'])} parameters, " if "flops" in facts else ""
    table.caption = f"{counted}{human(facts['bytes'])}B on disk, {len(saved['ranks'])} sites in Tucker form."
    return table
