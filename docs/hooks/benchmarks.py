"""mkdocs hook: the tables of measured results, made from `docs/data/*.json` when the site is built."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

_PUBLISHED = re.compile(r"<!-- bench (\S+) -->")
_DATA = Path(__file__).parents[1] / "data"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the tables where a page asks for them, as `<!-- cifar10 -->` or `<!-- bench growth -->`."""
    tables: Mapping[str, Callable[[Any], str]] = {"cifar10": cifar10, "resnet50": resnet50}
    for name, table in tables.items():
        if f"<!-- {name} -->" in markdown:
            data = json.loads((_DATA / f"{name}.json").read_text(encoding="utf-8"))
            markdown = markdown.replace(f"<!-- {name} -->", table(data))
    return _PUBLISHED.sub(lambda match: published(match[1]), markdown)


def published(name: str) -> str:
    """Return the table of a benchmark as it was printed, with machine and date; see `benchmarks.published`."""
    path = _DATA / "bench" / f"{name}.json"
    if not path.is_file():
        return f"*`{name}` has not been run yet.*"
    data = json.loads(path.read_text(encoding="utf-8"))
    header, rows = data["header"], data["rows"]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + f"\n\n{' '.join(data['where'].split())}.\n"


def cifar10(data: Mapping[str, Any]) -> str:
    """Return a table with a row per budget and method: mean and standard deviation over the seeds."""
    groups: dict[tuple[str, str, str], list[Mapping[str, float]]] = {}
    for result in data["results"]:
        groups.setdefault((result["budget"], result["optimizer"], result["row"]), []).append(result)
    heads = ("budget", "optimizer", "method", "test accuracy", "dense network", "seeds", "flops")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for names, runs in sorted(groups.items()):
        accuracy, baseline, flops = (mean(run[key] for run in runs) for key in ("accuracy", "baseline", "flops"))
        spread = f" ± {100 * stdev(run['accuracy'] for run in runs):.2f}" if len(runs) > 1 else ""
        cells = [*names, f"{accuracy:.2%}{spread}", f"{baseline:.2%}", str(len(runs)), f"{flops / 1e6:.2f} M"]
        lines.append(f"| {' | '.join(cells)} |")
    return _with_source(data["about"], lines)


def resnet50(data: Mapping[str, Any]) -> str:
    """Return a table with a row per budget, the original first."""
    lines = ["| flops kept | GFLOPs | parameters | agreement | ms per image |", "|---|---|---|---|---|"]
    lines += [
        f"| {point['budget']:g} | {point['flops'] / 1e9:.2f} | {point['params'] / 1e6:.1f} M "
        f"| {point['agreement']:.1%} | {point['milliseconds']:.1f} |"
        for point in reversed(data["points"])
    ]
    return _with_source(data["about"], lines)


def _with_source(about: Mapping[str, Any], lines: list[str]) -> str:
    command = f"`{about['command']}`, " if "command" in about else ""
    return "\n".join(lines) + f"\n\n{command}{about['date']}, {about['machine']}.\n"
