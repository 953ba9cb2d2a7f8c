"""Numbers and tables for people: the only place that formats them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from batude_fx.flops import dense_cost, site_cost
from batude_fx.sites import ConvSite

if TYPE_CHECKING:
    from batude_fx.compression import Plan
    from batude_fx.recipe import Recipe
    from batude_fx.record import SiteRecord
    from batude_fx.sweep import Point
    from batude_fx.training.loop import Result
    from batude_fx.training.preview import Preview

_WIDTH = 120
_SITE_WIDTH = 22
_FEW = 3
_STYLE: dict[str, Any] = {"box": SIMPLE_HEAD, "caption_justify": "left", "min_width": 64}


def human(count: float) -> str:
    """A count with three digits and a metric prefix: 4089184256 is "4.09 G"."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * scale:  # 999 999 is 1 M, not 1000 k
            return f"{count / scale:.3g} {prefix}"
    return f"{count:g} "


def percent(part: float, whole: float) -> str:
    """A share of a whole: "49.9 %"."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def milliseconds(seconds: float) -> str:
    """A wall time: 0.0441 is "44.1"."""
    return f"{1000 * seconds:.3g}"


def convolution(site: "ConvSite | SiteRecord") -> str:
    """A convolution in a few characters: "64 > 128 3x3", "Conv1d 8 > 8 5 dw" where it is depthwise."""
    kernel = "x".join(map(str, site.kernel_size))
    groups = " dw" if site.groups == site.in_channels > 1 else f" /{site.groups}" if site.groups > 1 else ""
    kind = "" if site.kind == "Conv2d" else f"{site.kind} "
    return f"{kind}{site.in_channels} > {site.out_channels} {kernel}{groups}".rstrip()


def ranks_text(ranks: tuple[int, int] | None) -> str:
    """Ranks in a few characters: "24 / 16", or "dense"."""
    return "{} / {}".format(*ranks) if ranks else "dense"


def plan_table(plan: "Plan") -> Table:
    """Every site of a plan with what it costs before and after and its ranks, and why some stay dense."""
    title = f"{plan.model_name}, budget: {plan.budget}, calibration: {plan.calibration}"
    table = _site_table(title, plan.sites, "flops", "after", "ranks", "loss")
    for site in plan.sites:
        ranks = plan.ranks.get(site.name)
        after = human(site_cost(site, ranks)[0]) if ranks else ""
        loss = f"{plan.losses[site.name]:.2g}" if ranks else ""
        _add_site(table, site, human(dense_cost(site)[0]), after, ranks_text(astuple(ranks) if ranks else None), loss)
    table.caption = (
        f"{human(plan.dense_flops)}FLOPs to {human(plan.flops)}FLOPs ({percent(plan.flops, plan.dense_flops)}), "
        f"{human(plan.dense_params)} to {human(plan.params)} parameters ({percent(plan.params, plan.dense_params)}); "
        f"{_times(plan)}{len(plan.ranks)} of {len(plan.sites)} sites replaced. Ranks are out / in, per group, "
        f"multiples of {plan.round_to}; one multiply-add is one flop.{_notes(plan.sites)}"
    )
    return table


def _times(plan: "Plan") -> str:
    if plan.seconds is None or plan.dense_seconds is None:
        return ""
    return (
        f"{milliseconds(plan.dense_seconds)} to {milliseconds(plan.seconds)} ms a run "
        f"(speed-up {plan.dense_seconds / plan.seconds:.2f}x); "
    )


def sites_table(sites: Sequence[ConvSite], model_name: str) -> Table:
    """Every convolution of a model: sizes, cost, how it was found, and why it would stay dense."""
    table = _site_table(model_name, sites, "flops", "params", "calls", "found")
    for site in sites:
        flops, params = dense_cost(site)
        _add_site(table, site, human(flops), human(params), str(site.calls), site.found_by)
    eligible = [site for site in sites if site.skip_reason is None]
    table.caption = f"{len(eligible)} of {len(sites)} can be replaced. One multiply-add is one flop.{_notes(sites)}"
    return table


def saved_table(folder: object, facts: dict[str, Any]) -> Table:
    """What a saved folder holds, and its Tucker modules."""
    saved = facts["model_args"]
    title = escape(f"{folder}: {saved['library'] or 'foreign'} {saved['base'] or ''}")
    table = Table("site", "ranks", title=title, **_STYLE)
    for name, (rank_out, rank_in) in saved["ranks"].items():
        table.add_row(escape(name), ranks_text((rank_out, rank_in)))
    flops = f"{human(facts['flops'])}FLOPs, " if "flops" in facts else ""
    table.caption = (
        f"{flops}{human(facts['params'])} parameters, {human(facts['bytes'])}B on disk; {len(saved['ranks'])} sites in "
        "Tucker form. Ranks are out / in, per group."
    )
    return table


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    table = Table(title=escape(title), show_header=False, box=SIMPLE_HEAD)
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def recipes_table(recipes: Mapping[str, "Recipe"]) -> Table:
    """Names of recipes, and what they do."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("recipe", "network", "flops", "images", "epochs"):
        table.add_column(column, no_wrap=column == "recipe", overflow="fold")
    for name, one in recipes.items():
        phases = (one.pretrain, one.one_shot, one.finalize)
        epochs = " + ".join(str(phase.epochs).removesuffix(" epochs") for phase in phases if phase)
        images = one.data.name.removeprefix("torch/") or "a folder"
        budget = str(one.budget).removeprefix("flops ")
        table.add_row(*map(escape, (name, one.model.name, budget, images, epochs)))
    table.caption = "batude-fx recipes show NAME prints one, batude-fx train NAME --dry-run says what it would do."
    return table


def schedule_table(recipe: "Recipe", ahead: "Preview") -> Group:
    """The phases of a recipe and the rounds of its one-shot training."""
    phases = Table("phase", "length", "optimizer", "lr", "schedule", "distillation", title="schedule", **_STYLE)
    for name in ("pretrain", "one_shot", "finalize"):
        one = getattr(recipe, name)
        if one:
            teacher = getattr(one, "distillation", None)
            taught = f"{teacher.weight:g}, T = {teacher.temperature:g}" if teacher else "-"
            warm = f", warm-up {one.warmup}" if one.warmup.amount else ""
            phases.add_row(name, str(one.epochs), one.optimizer, f"{one.lr:g}", f"{one.scheduler}{warm}", taught)
    unit = recipe.one_shot.epochs.unit.removesuffix("s")
    rounds = Table("round", f"from {unit}", "flops that remain", "rho", title="rounds of one_shot", **_STYLE)
    for index, (epoch, keep, rho) in enumerate(ahead.rounds):
        rounds.add_row(str(index), f"{epoch:g}", percent(keep, 1), f"{rho:.2g}")
    rounds.caption = (
        f"fvcore counts {human(ahead.flops)}FLOPs of {human(ahead.plan.dense_flops)}FLOPs, "
        f"{ahead.plan.dense_flops / ahead.flops:.3f} times fewer. The plan's ranks are those of fresh weights: they "
        "show that the budget can be met, training finds others. Nothing was trained."
    )
    return Group(phases, rounds)


def result_table(folder: str, result: "Result") -> Table:
    """What a run gave, before and after."""
    table = Table("", "original", "compressed", "", title=escape(folder), **_STYLE)
    table.add_row("accuracy", f"{result.original_accuracy:.2%}", f"{result.accuracy:.2%}", "")
    for name, before, after in (
        ("flops", result.dense_flops, result.flops), ("parameters", result.dense_params, result.params)
    ):  # fmt: skip
        table.add_row(name, human(before).strip(), human(after).strip(), f"{percent(after, before)} remain")
    table.caption = (
        f"{len(result.ranks)} sites in Tucker form after {len(result.rounds)} rounds. In the folder: model/ for "
        "batude_fx.load with its report.html, ranks.png, result.json, log.jsonl, recipe.yaml, original.safetensors."
    )
    return table


def sweep_table(name: str, points: Sequence["Point"]) -> Table:
    """Every budget of a sweep."""
    labelled = points[0].top1 is not None
    columns = ("budget", "flops", "parameters", "ms/image", "agreement", *(("top 1", "top 5") if labelled else ()))
    table = Table(title=escape(name), **_STYLE)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        shares = [point.agreement, *((point.top1 or 0.0, point.top5 or 0.0) if labelled else ())]
        budget = f"{point.budget:g}" if point.budget < 1 else "original"
        counts = human(point.flops).strip(), human(point.params).strip(), f"{point.milliseconds:.2f}"
        table.add_row(budget, *counts, *(f"{share:.4f}" for share in shares))
    table.caption = "Agreement: images for which the original names the same class. One image at a time, medians."
    return table


def training_line(record: dict[str, Any]) -> str:
    """One line of a training log: an evaluation, or a round of BC-ADL."""
    start = f"{record['phase']:<9} step {record['step']:>6}"
    if "round" not in record:
        return (
            f"{start}  epoch {record['epoch']:6.2f}  loss {record['loss']:.4f}  accuracy {record['accuracy']:.2%}  "
            f"lr {record['lr']:.2g}"
        )
    return (
        f"{start}  round {record['round']:>3}  primal {record['primal']:.3f}  dual {record['dual']:.3f}  "
        f"rho {record['rho']:.2g}  ranks need {human(record['flops'])}FLOPs ({record['keep']:.1%})"
    )


def as_text(table: Table) -> str:
    """The table as plain text, for `print` and log files."""
    text = StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue().rstrip()


def _site_table(title: str, sites: Sequence[ConvSite], *columns: str) -> Table:
    table = Table(title=escape(title), padding=(0, 1, 0, 0), **_STYLE)
    longest = max((len(site.name) for site in sites), default=0)
    table.add_column("site", overflow="fold", min_width=min(longest, _SITE_WIDTH))
    table.add_column("convolution", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")  # the mark of a note
    return table


def _add_site(table: Table, site: ConvSite, *cells: str) -> None:
    mark = "*" if site.skip_reason else ""
    table.add_row(escape(site.name), convolution(site), *cells, mark)


def _notes(sites: Iterable[ConvSite]) -> str:
    """The reasons why sites cannot be replaced, each with its sites."""
    named: dict[str, list[str]] = {}
    for site in sites:
        if site.skip_reason:
            named.setdefault(site.skip_reason, []).append(site.name)
    return "".join(escape(f"\n* {reason}: {_few(names)}") for reason, names in named.items())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _FEW else f"{', '.join(names[:_FEW])} and {len(names) - _FEW} more"
