"""Write the table of a benchmark as JSON under `docs/data/bench/`, with date, machine and versions, for the site."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.table import Table

import batude_fx

FOLDER = Path(__file__).parents[1] / "docs" / "data" / "bench"


def publish(name: str, table: Table, where: str) -> None:
    """Write a table whose cells are plain text.

    Args:
        name: Name of the file, without its ending.
        table: The table as it is printed.
        where: The result of `environment` before the measurement.
    """
    cells = [list(map(str, column.cells)) for column in table.columns]
    data = {
        "where": where,
        "header": [str(column.header) for column in table.columns],
        "rows": list(zip(*cells, strict=True)),
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def environment() -> str:
    """Describe date, machine, load and versions."""
    packages = ("torch", "torchvision", "torch-pruning", "fvcore")
    libraries = ", ".join(f"{name} {version(name)}" for name in packages)
    cores, load = os.cpu_count(), os.getloadavg()[0]
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {processor()}, {cores} cores, {torch.get_num_threads()} threads, "
        f"load {load:.1f} before\nPython {platform.python_version()}, batude_fx {batude_fx.__version__}, {libraries}"
    )


def processor() -> str:
    """Return the name of the processor on Linux, its architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
