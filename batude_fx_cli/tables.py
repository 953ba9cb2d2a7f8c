"""The tables of `batude-fx info`, `batude-fx export` and `batude-fx sweep`."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from batude_fx.deploy.comparison import Comparison
from batude_fx.graph.site_table import describe_ranks
from batude_fx.report.record import Record
from batude_fx.report.sweep_points import Point
from batude_fx.support.numbers import human
from batude_fx.support.tables import add_row, facts_table, new_table


def saved_table(folder: object, facts: dict[str, Any], record: Record | None = None) -> Table:
    """Return the table of a saved folder: its sites with their ranks, its size, and its quality where it is known."""
    saved = facts["model_args"]
    title = f"{folder}: {saved['library'] or 'foreign'} {saved['base'] or ''}"
    table = new_table("site", "ranks", title=title)
    for name, (rank_out, rank_in) in saved["ranks"].items():
        add_row(table, name, describe_ranks((rank_out, rank_in)))
    flops = f"{human(facts['flops'])}FLOPs, " if "flops" in facts else ""
    table.caption = (
        f"{flops}{human(facts['params'])} parameters, {human(facts['bytes'])}B on disk; {len(saved['ranks'])} sites in "
        f"Tucker form. Ranks are out / in, per group.{_quality_text(record)}"
    )
    return table


def _quality_text(record: Record | None) -> str:
    """Return what is known of the quality of a saved network, as a part of its caption."""
    if record and record.quality:
        restored = f" It {record.restoration}." if record.restoration else ""
        return f" The network {record.quality}.{restored}"
    if record and record.training and record.training.accuracy is not None:
        original = record.training.original_accuracy
        return f" Accuracy after training: {record.training.accuracy:.2%} (original {original:.2%})."
    return " Its quality was not measured."


def comparison_table(path: str, size: int, comparison: Comparison, *, on_noise: bool) -> Table:
    """Return the table of an exported file: its size, and how its outputs compare with those of the network."""
    rows = [("size", f"{human(size)}B")]
    rows += [(f"input {name!r}", " x ".join(shape)) for name, shape in comparison.inputs.items()]
    if on_noise:
        rows.append(("largest difference of an output", f"{comparison.difference:.1e} of the largest output"))
    else:
        if comparison.agreement is not None and comparison.agreement_interval is not None:
            low, high = comparison.agreement_interval
            share = f"{comparison.agreement:.1%} of {comparison.images} images, 95 % interval {low:.1%} to {high:.1%}"
            rows.append(("same class as the network", share))
        rows.append(("squared error of the outputs", f"{comparison.relative_error:.1%} of the squared outputs"))
    return facts_table(path, rows)


def sweep_table(name: str, points: Sequence[Point]) -> Table:
    """Return the table of a sweep: a row per budget, the original network last."""
    has_labels = points[0].top1 is not None
    columns = ("budget", "flops", "parameters", "ms/image", "agreement", *(("top 1", "top 5") if has_labels else ()))
    table = new_table(title=name)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        shares = [point.agreement, *((point.top1 or 0.0, point.top5 or 0.0) if has_labels else ())]
        budget = f"{point.budget:g}" if point.budget < 1 else "original"
        counts = human(point.flops).strip(), human(point.params).strip(), f"{point.milliseconds:.2f}"
        add_row(table, budget, *counts, *(f"{share:.4f}" for share in shares))
    table.caption = (
        "Agreement: share of images for which the original predicts the same class. Times: medians of one image."
    )
    return table
