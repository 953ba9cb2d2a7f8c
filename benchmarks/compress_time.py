"""Wall time and memory of `compress`, compared with limits.

Run `make bench`, or `python -m benchmarks.compress_time [--quick]`; about ten minutes on 2 idle cores, `--quick` one.
Calls that are compared run alternately in one process, on torch's default number of threads; the table shows medians
with the fastest and the slowest turn. The exit code is 1 if a limit is exceeded.

The weights are random, since the work does not depend on training. The images are synthetic. Torch-Pruning's one-shot
pruner is run as in its documentation, dependency graph and importance included. It changes its argument, so copying the
model is part of its measured time; `compress` copies the model itself.
"""

import argparse
import copy
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch_pruning
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import batude_fx
from batude_fx.calibration.dead_leaves import dead_leaves
from benchmarks.published import environment, publish

KEEP = 0.5
PRUNING_RATIO = 0.3  # searched beforehand: leaves 0.497 of ResNet-18's flops
IMAGES = 256
BATCH = 8  # of the plain forward passes; compress processes the images in batches of this size, too
GIB = 2**30

CONSOLE = Console(width=120)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        what: What was measured.
        measured: The result, a ratio, seconds or bytes; lower is better.
        limit: The limit, in the same unit.
        unit: "x", "s" or "GiB".
        detail: The values that the result was computed from.
    """

    what: str
    measured: float
    limit: float
    unit: str
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the limit is met."""
        return self.measured <= self.limit


@dataclass(frozen=True)
class Peak:
    """Memory of a fresh process, in bytes.

    Attributes:
        model: Size of the parameters and buffers.
        before: Resident memory with the libraries, the model and the images, just before `compress`.
        highest: The largest resident memory until `compress` returned.
    """

    model: int
    before: int
    highest: int


def main(*, quick: bool) -> int:
    """Measure, print and publish the table."""
    where = environment()
    CONSOLE.print(where)
    rows = weights_only()
    if not quick:
        rows += [default_call(), calibrated(), memory()]
        publish("compress_time", table(rows), where)
    CONSOLE.print(table(rows))
    return 0 if all(row.ok for row in rows) else 1


def weights_only() -> list[Row]:
    """Compare the call without images with Torch-Pruning, and with itself on a larger network."""
    resnet18, resnet50 = torchvision.models.resnet18().eval(), torchvision.models.resnet50().eval()
    walls = alternating(
        {
            "compress": lambda: batude_fx.compress(resnet18, KEEP, calibration=None),
            "Torch-Pruning": lambda: prune(resnet18),
            "ResNet-50": lambda: batude_fx.compress(resnet50, KEEP, calibration=None),
        },
        rounds=9,
        warm_up=2,
    )
    own, other, large = walls["compress"], walls["Torch-Pruning"], walls["ResNet-50"]
    return [
        Row(
            "ResNet-18, weights only / Torch-Pruning",
            median(own) / median(other),
            1.0,
            "x",
            f"{spread(own)} / {spread(other)}",
        ),
        Row(
            "ResNet-50 / ResNet-18, weights only",
            median(large) / median(own),
            4.0,
            "x",
            f"{spread(large)} / {spread(own)}",
        ),
    ]


def prune(model: nn.Module) -> nn.Module:
    """Prune a copy of the model to half of its flops by Torch-Pruning's one-shot pruner."""
    pruned = copy.deepcopy(model)
    pruner = torch_pruning.pruner.BasePruner(  # MagnitudePruner and MetaPruner are aliases of this class
        pruned,
        torch.randn(1, 3, 224, 224),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=PRUNING_RATIO,
        ignored_layers=[pruned.fc],
    )
    pruner.step()
    return pruned


def default_call() -> Row:
    """Time the default call, which generates images."""
    model = torchvision.models.resnet50().eval()
    walls = alternating({"default": lambda: batude_fx.compress(model, KEEP)}, rounds=3)["default"]
    return Row("ResNet-50, default call", median(walls), 60.0, "s", spread(walls))


def calibrated() -> Row:
    """Compare the call with images with forward passes of the network over them."""
    model, images = torchvision.models.resnet50().eval(), calibration_images()
    walls = alternating(
        {
            "compress": lambda: batude_fx.compress(model, KEEP, calibration=images),
            "forward": lambda: forward(model, images),
        },
        rounds=3,
    )
    own, plain = walls["compress"], walls["forward"]
    detail = f"{spread(own)} / {spread(plain)}"
    return Row(f"ResNet-50, {IMAGES} images / plain forward passes", median(own) / median(plain), 6.0, "x", detail)


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> None:
    """Run the network on the images."""
    for batch in images.split(BATCH):  # type: ignore[no-untyped-call]
        model(batch)


def calibration_images() -> Tensor:
    """Return synthetic images (256, 3, 224, 224), normalized approximately as photographs are."""
    return (dead_leaves(IMAGES, (224, 224), seed=1) - 0.45) / 0.225


def memory() -> Row:
    """Measure the memory that a calibrated call adds to a process that already holds the model and the images."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        peak = fresh.submit(peak_of_calibrated).result()
    limit = 2 * peak.model + GIB
    detail = f"model {peak.model / GIB:.3f} GiB, {peak.before / GIB:.2f} GiB before, {peak.highest / GIB:.2f} GiB peak"
    return Row(
        f"ResNet-50, {IMAGES} images, added memory", (peak.highest - peak.before) / GIB, limit / GIB, "GiB", detail
    )


def peak_of_calibrated() -> Peak:
    """Run a calibrated call and measure the memory of this process."""
    model, images = torchvision.models.resnet50().eval(), calibration_images()
    # A small call first: memory that libraries allocate at their first use is not counted.
    tiny = nn.Sequential(nn.Conv2d(3, 64, 3, stride=8), nn.Conv2d(64, 64, 3))
    batude_fx.compress(tiny, KEEP, calibration=images[:8], example_inputs=images[:1])
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the memory
    before = resident("VmRSS")
    batude_fx.compress(model, KEEP, calibration=images)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return Peak(size, before, resident("VmHWM"))


def resident(name: str) -> int:
    """Return bytes of memory of this process; `getrusage` would include the peak of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def alternating(calls: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Return the wall seconds of calls that run alternately, so that load on the machine affects all alike."""
    walls: dict[str, list[float]] = {name: [] for name in calls}
    for turn in track(range(rounds + warm_up), ", ".join(calls), console=CONSOLE, transient=True):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                walls[name].append(time.perf_counter() - start)
    return walls


def spread(walls: list[float]) -> str:
    """Describe the median, and the fastest and slowest turn."""
    return f"{median(walls):.3g} s ({min(walls):.3g} to {max(walls):.3g})"


def table(rows: list[Row]) -> Table:
    """Return the table of all rows."""
    shown = Table("what", "measured", "limit", "", "median seconds (fastest to slowest), or memory")
    for row in rows:
        verdict = "[green]ok" if row.ok else "[red]missed"
        shown.add_row(row.what, f"{row.measured:.2f} {row.unit}", f"{row.limit:.2f} {row.unit}", verdict, row.detail)
    return shown


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.jit is deprecated, and fvcore imports it
    parser = argparse.ArgumentParser(description="Wall time and memory of compress.")
    parser.add_argument("--quick", action="store_true", help="only the two lines without images")
    sys.exit(main(quick=parser.parse_args().quick))
