"""mkdocs hook: the table of the CIFAR-10 benchmark, made from `docs/data/cifar10.json` when the site is built."""

import json
from pathlib import Path
from statistics import mean

_DATA = Path(__file__).parents[1] / "data" / "cifar10.json"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the table where a page asks for it, as `<!-- cifar10 -->`."""
    return markdown.replace("<!-- cifar10 -->", table()) if "<!-- cifar10 -->" in markdown else markdown


def table() -> str:
    """One line per budget and method; several seeds are averaged."""
    data = json.loads(_DATA.read_text(encoding="utf-8"))
    about, runs = data["about"], data["results"]
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        groups.setdefault((run["budget"], run["row"]), []).append(run)
    lines = ["| budget | method | test accuracy | dense network | seeds | flops used |", "|---|---|---|---|---|---|"]
    for (budget, row), found in sorted(groups.items()):
        accuracy, baseline, used = (mean(run[key] for run in found) for key in ("accuracy", "baseline", "flops"))
        lines.append(
            f"| {budget} | {row} | {accuracy:.2%} | {baseline:.2%} | {len(found)} | {used / 1e6:.2f} M |"
        )
    return f"Measured on {about['date']}, {about['machine']}.\n\n" + "\n".join(lines) + "\n"
