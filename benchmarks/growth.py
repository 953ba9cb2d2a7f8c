"""How time and memory of the parts of `compress` grow with the number of sites and of channels.

Run `make bench-growth`, or `python -m benchmarks.growth`; about five minutes on idle cores. Depth is varied with
ResNet-18, 50 and 152, width with ResNet-50 with one, two and four times as many inner channels. Weights are random,
with eight random images and two threads. Every part is run twice in a fresh process; the table shows the time of the
faster run, and the memory that the part added at its peak. An exponent is the slope of log seconds over log sites, or
over log width, by least squares. "eigen" is the time of the eigendecompositions of all modes of all sites alone
(LAPACK, cubic in the channels). The exit code is 1 if a part grows faster with the width than "eigen", by more than 0.1
in the exponent.
"""

import multiprocessing
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import batude_fx
from batude_fx.budget.cost_limits import CostLimits
from batude_fx.budget.knapsack import allocate
from batude_fx.budget.rank_options import site_options
from batude_fx.calibration.statistics import statistics
from batude_fx.support.inputs import Inputs
from batude_fx.support.timing import now
from batude_fx.tucker.dense_layers import canonical_weight
from batude_fx.tucker.spectra import metric_spectrum, weight_spectrum
from benchmarks.compress_time import resident
from benchmarks.published import environment, publish
from benchmarks.workers import follow_parent

NETWORKS = {
    "ResNet-18": ("resnet18", 64), "ResNet-50": ("resnet50", 64), "ResNet-152": ("resnet152", 64),
    "ResNet-50, x2": ("resnet50", 128), "ResNet-50, x4": ("resnet50", 256),
}  # fmt: skip
DEPTH, WIDTH = ("ResNet-18", "ResNet-50", "ResNet-152"), ("ResNet-50", "ResNet-50, x2", "ResNet-50, x4")
PARTS = ("discover", "calibrate", "decompose", "allocate", "eigen")
SLACK = 0.1
CONSOLE = Console(width=140)


def main() -> int:
    """Measure every network, fit the exponents, print and publish the table."""
    warnings.simplefilter("ignore")
    where = environment()
    CONSOLE.print(where)
    facts: dict[str, dict[str, Any]] = {}
    for name in track(NETWORKS, "measuring", console=CONSOLE, transient=True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), follow_parent) as fresh:
            facts[name] = fresh.submit(measure, *NETWORKS[name]).result()
    table = Table("network", "sites", *(f"{part}, s (MiB)" for part in PARTS), title="Cost of growth")
    for name, costs in facts.items():
        cells = (f"{costs[part][0]:.2f} ({costs[part][1] / 2**20:.0f})" for part in PARTS)
        table.add_row(name, str(costs["sites"]), *cells)
    deeper = [
        slope([facts[name]["sites"] for name in DEPTH], [facts[name][part][0] for name in DEPTH]) for part in PARTS
    ]
    wider = [slope([1, 2, 4], [facts[name][part][0] for name in WIDTH]) for part in PARTS]
    table.add_row("exponent of sites", "", *(f"{exponent:.2f}" for exponent in deeper))
    table.add_row("exponent of width", "", *(f"{exponent:.2f}" for exponent in wider))
    CONSOLE.print(table)
    publish("growth", table, where)
    return int(max(wider[:-1]) > wider[-1] + SLACK)


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Return the slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(name: str, width: int) -> dict[str, Any]:
    """Return the seconds and peak bytes of each part."""
    model: nn.Module = torchvision.models.get_model(name, width_per_group=width).eval()
    image, images = torch.zeros(1, 3, 224, 224), torch.randn(8, 3, 224, 224)
    facts: dict[str, Any] = {}

    def part(label: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the part gives
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the memory
        before, seconds, results = resident("VmRSS"), [], []
        for _ in range(2):
            start = now()
            results = [call()]
            seconds.append(now() - start)
        facts[label] = (min(seconds), resident("VmHWM") - before)
        return results[0]

    found = part("discover", lambda: batude_fx.discover(model, image))
    sites = [site for site in found if site.skip_reason is None]
    facts["sites"] = len(sites)
    metrics = part("calibrate", lambda: statistics(model, sites, [Inputs((images,))]))
    spectra = part("decompose", lambda: {name: metric_spectrum(one) for name, one in metrics.items()})
    options = [site_options(site, 8) for site in sites]
    judged = [one.with_losses(spectra[site.name].loss()) for site, one in zip(sites, options, strict=True)]
    dense = tuple(int(cost) for cost in np.sum([one.dense for one in options], axis=0))
    capacity = CostLimits.of_sites(options, batude_fx.Budget(flops=0.5), dense, 8).capacity(options)
    part("allocate", lambda: allocate(judged, capacity))
    layers = [canonical_weight(model.get_submodule(site.name)) for site in sites]
    part(
        "eigen", lambda: [weight_spectrum(one, pointwise=s.is_pointwise) for s, one in zip(sites, layers, strict=True)]
    )
    return facts


if __name__ == "__main__":
    sys.exit(main())
