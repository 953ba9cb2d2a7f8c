"""mkdocs hook: the zoo page's tables, made from `docs/data/zoo.json` when the site is built."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parents[1] / "data" / "zoo.json"

Record = Mapping[str, Any]


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the tables where a page asks for them, as `<!-- zoo:models -->`."""
    if "<!-- zoo:" not in markdown:
        return markdown
    data = json.loads(_DATA.read_text())
    tables = {"summary": summary, "reasons": reasons, "families": families, "models": models}
    for name, table in tables.items():
        markdown = markdown.replace(f"<!-- zoo:{name} -->", table(data))
    return markdown


def summary(data: Record) -> str:
    """Return the totals of the sweep, with its date and the versions of the libraries."""
    records = data["models"]
    convolutions = sum(record["convolutions"] for record in records)
    eligible = sum(record["eligible"] for record in records)
    found_by = sum((Counter(record["found_by"]) for record in records), Counter())
    versions = ", ".join(f"{library} {number}" for library, number in data["versions"].items())
    rows = [
        ("models discovered", f"{len(records):,}"),
        ("of them without weights, as too large", f"{sum(record['weightless'] for record in records):,}"),
        ("convolutions found", f"{convolutions:,}"),
        ("convolutions that ran but were not found", f"{sum(abs(r['counted'] - r['calls']) for r in records):,}"),
        ("can be replaced", f"{eligible:,} ({eligible / convolutions:.0%})"),
        ("found in the graph of the whole model", f"{found_by['fx']:,}"),
        ("found inside a module that the tracer does not enter", f"{found_by['leaf']:,}"),
        ("found in the graph of a part, as the whole cannot be traced", f"{found_by['child']:,}"),
        ("found in the module tree only", f"{found_by['tree']:,}"),
        ("families compressed", f"{sum('replaced' in r for r in data['families'])} of {len(data['families'])}"),
    ]
    return f"Swept on {data['date']} with {versions}.\n\n{_table(('what', 'how many'), rows)}"


def reasons(data: Record) -> str:
    """Return every reason why a layer stays dense, with the number of layers and models it applies to."""
    rows = []
    for kind, key in (("convolution", "skipped"), ("linear layer", "linear_skipped")):
        layers, where = Counter[str](), dict[str, list[str]]()
        for record in data["models"]:
            layers.update(record[key])
            for reason in record[key]:
                where.setdefault(reason, []).append(record["name"])
        for reason, count in layers.most_common():
            names = ", ".join(where[reason][:3]) + (", ..." if len(where[reason]) > 3 else "")
            rows.append((kind, reason, f"{count:,}", f"{len(where[reason]):,}", names))
    rows += [("whole family", record["note"], "", "1", record["family"]) for record in _noted(data)]
    return _table(("what", "reason", "layers", "models", "examples"), rows)


def families(data: Record) -> str:
    """Return a table of the compressed models, one per family."""
    rows = [
        (
            record["family"],
            record["name"].partition(":")[2],
            record["layers"],
            f"{record['replaced']} of {record['sites']}",
            f"{record['flops'] / 1e9:.3f}",
            f"{record['compressed'] / 1e9:.3f}",
            f"{record['keep']:.3f}",
            f"{record['compressed'] / record['flops']:.3f}",
        )
        for record in data["families"]
        if "replaced" in record
    ]
    header = ("family", "smallest model", "layers", "replaced", "GFLOPs", "compressed", "budget", "kept")
    return _table(header, rows)


def models(data: Record) -> str:
    """Return a table of every model: its layers, the share that can be replaced, and the smallest budget."""
    header = (
        "model",
        "parameters (M)",
        "GFLOPs",
        "convolutions",
        "replaceable",
        "their share of flops",
        "smallest budget",
        "share with linear",
        "smallest with linear",
    )
    return _table(header, (_row(record) for record in data["models"]), sortable=True)


def _row(record: Record) -> tuple[str, ...]:
    reach = (record.get(layers, {}) for layers in ("conv", "conv+linear"))
    shares = (f"{layers[key]:.3f}" if layers else "" for layers in reach for key in ("share", "smallest"))
    flops = f"{record['flops'] / 1e9:.3f}" if "flops" in record else ""
    counts = (f"{record['params'] / 1e6:.2f}", flops, str(record["convolutions"]), str(record["eligible"]))
    return (record["name"], *counts, *shares)


def _noted(data: Record) -> list[Record]:
    return [record for record in data["families"] if "note" in record]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], *, sortable: bool = False) -> str:
    """Return HTML: parsing a thousand rows of Markdown would take a minute. docs/javascripts sorts the table."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    start = "<table data-sortable>" if sortable else "<table>"
    return f"{start}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
