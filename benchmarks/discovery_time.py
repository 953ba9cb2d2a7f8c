"""Wall time of discovery and flop count, compared with fvcore alone on the same model; one thread.

Run `make bench`, or `python -m benchmarks.discovery_time`; about half a minute. Both run alternately in one process;
the table shows medians with the fastest and the slowest turn. The exit code is 1 if a limit is exceeded.
"""

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import timm
import torch
from fvcore.nn import FlopCountAnalysis
from rich.console import Console
from rich.progress import track
from rich.table import Table

import batude_fx
from batude_fx.graph.example_inputs import example_inputs
from batude_fx.graph.flops import count_flops
from benchmarks.published import environment, publish

LIMITS = {"resnet50": 1.5, "efficientnet_b4": 4.0}  # seconds
MOST = 2.0  # times the time of fvcore
TURNS = 11


@dataclass(frozen=True)
class Row:
    """The seconds of every turn for one model."""

    name: str
    ours: list[float]
    fvcore: list[float]

    @property
    def ratio(self) -> float:
        """Ratio of the medians."""
        return median(self.ours) / median(self.fvcore)

    @property
    def ok(self) -> bool:
        """Whether both limits are met."""
        return median(self.ours) <= LIMITS[self.name] and self.ratio <= MOST


def main() -> int:
    """Measure every model, print and publish the table."""
    console = Console(width=120)
    torch.set_num_threads(1)
    where = environment()
    console.print(where)
    rows = [measure(name) for name in LIMITS]
    table = Table("model", "discover + count_flops (s)", "limit", "fvcore alone (s)", "ratio", "limit", "")
    for row in rows:
        limit = f"{LIMITS[row.name]:.1f} s"
        verdict = "ok" if row.ok else "missed"
        table.add_row(
            row.name, spread(row.ours), limit, spread(row.fvcore), f"{row.ratio:.2f}x", f"{MOST:.0f}x", verdict
        )
    console.print(table)
    publish("discovery_time", table, where)
    return 0 if all(row.ok for row in rows) else 1


def measure(name: str) -> Row:
    """Time both alternately, after one warm-up turn."""
    model = timm.create_model(name).eval()
    inputs = example_inputs(model)

    def ours() -> None:
        batude_fx.discover(model)
        count_flops(model, inputs)

    def fvcore() -> None:
        with torch.no_grad():
            analysis = FlopCountAnalysis(model, inputs)
            analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total()

    turns = [(seconds(ours), seconds(fvcore)) for _ in track(range(TURNS + 1), description=name)]
    return Row(name, *(list(times) for times in zip(*turns[1:], strict=True)))


def seconds(action: Callable[[], None]) -> float:
    """Return the wall seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def spread(times: list[float]) -> str:
    """Describe the median, and the fastest and slowest turn."""
    return f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
