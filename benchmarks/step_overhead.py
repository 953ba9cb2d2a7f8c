"""The cost of learning ranks for ResNet-50: a training step with the penalty, and a projection round.

Run `make bench`, or `python -m benchmarks.step_overhead`; about five minutes on 2 idle cores. Steps use SGD and batches
of 8 images at 224 pixels, alternately with and without the penalty. A round is `Lagrangian.project_` and
`update_duals_` at half of the flops, with losses from the weights alone and from the metrics of images. Measuring these
metrics has a row of its own, since its time depends on the number of images. The exit code is 1 if a limit is exceeded.
"""

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from batude_fx import Recipe
from batude_fx.calibration.statistics import statistics
from batude_fx.support.inputs import Inputs
from batude_fx.training.lagrangian import Lagrangian
from batude_fx.training.problem import Problem
from batude_fx.tucker.metric import Metric
from benchmarks.published import environment, publish

TURNS = 12
IMAGES = 64
STEP_LIMIT, ROUND_LIMIT = 1.05, 10.0  # ratio, seconds

CONSOLE = Console(width=120)


def main() -> int:
    """Measure, print and publish the table, compare with the limits."""
    warnings.simplefilter("ignore")
    where = environment()
    CONSOLE.print(where)
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    recipe = Recipe.from_yaml("resnet50-imagenet-2.04x", ["budget=0.5"])
    problem = Problem.of(model, recipe)
    lagrangian = Lagrangian(problem.constraints(model), rho=0.1)

    plain, penalized = steps(model, lagrangian)
    images = torch.randn(IMAGES, 3, 224, 224)
    started = time.perf_counter()
    metrics = statistics(model, list(problem.sites.values()), (Inputs((batch,)) for batch in torch.split(images, 8)))
    measuring = time.perf_counter() - started
    rounds = {
        name: [seconds(partial(project, lagrangian, problem, round_metrics)) for _ in range(3)]
        for name, round_metrics in (("by the weights", None), ("by metrics", metrics))
    }

    ratio = median(penalized) / median(plain)
    table = Table("what", "measured", "limit", "", "detail", title="ResNet-50")
    detail = f"{_spread(penalized)} with, {_spread(plain)} without, {TURNS} turns"
    table.add_row(
        "a step with the penalty / without", f"{ratio:.3f}x", f"{STEP_LIMIT}x", _ok(ratio, STEP_LIMIT), detail
    )
    for name, walls in rounds.items():
        worst = max(walls)
        table.add_row(f"a round, {name}", f"{worst:.1f} s", f"{ROUND_LIMIT} s", _ok(worst, ROUND_LIMIT), _spread(walls))
    table.add_row("measuring metrics", f"{measuring:.1f} s", "", "", f"{IMAGES} images")
    CONSOLE.print(table)
    publish("step_overhead", table, where)
    return 0 if ratio <= STEP_LIMIT and max(map(max, rounds.values())) <= ROUND_LIMIT else 1


def project(lagrangian: Lagrangian, problem: Problem, metrics: Mapping[str, Metric] | None) -> None:
    """Run one projection round."""
    lagrangian.project_(problem.capacity, metrics)
    lagrangian.update_duals_()


def steps(model: nn.Module, lagrangian: Lagrangian) -> tuple[list[float], list[float]]:
    """Return the wall seconds of steps without and with the penalty, run alternately."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))

    def step(*, penalty: bool) -> None:
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        if penalty:
            lagrangian.penalty_()
        optimizer.step()
        optimizer.zero_grad()

    walls: tuple[list[float], list[float]] = ([], [])
    for turn in track(range(TURNS + 2), "steps, in turns", console=CONSOLE):
        for penalty in (False, True) if turn % 2 else (True, False):
            wall = seconds(partial(step, penalty=penalty))
            if turn >= 2:  # the first turns warm up
                walls[penalty].append(wall)
    return walls


def seconds(action: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _spread(walls: list[float]) -> str:
    return f"{median(walls):.2f} s ({min(walls):.2f} to {max(walls):.2f})"


def _ok(measured: float, limit: float) -> str:
    return "ok" if measured <= limit else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
