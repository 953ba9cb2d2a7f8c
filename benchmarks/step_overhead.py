"""What learning ranks costs: a training step with the penalty against a plain one, and a projection round; ResNet-50.

Run `make bench`, or `python -m benchmarks.step_overhead`; about five minutes on 2 idle cores. Steps are of batch 8 at
224 pixels with SGD; with and without the penalty they take turns. A round is `Lagrangian.project_` and `update_duals_`
under half of the flops, judged by the weights and by metrics of images; measuring these metrics is a line of its own,
since it grows with the number of images, not with the method. Exit code 1 when a limit is missed.
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
from batude_fx.training.lagrangian import Lagrangian
from batude_fx.training.problem import Problem
from batude_fx.tucker.spectra import Metric
from benchmarks.published import environment, publish

TURNS = 12
IMAGES = 64
STEP_LIMIT, ROUND_LIMIT = 1.05, 10.0  # ratio, seconds

CONSOLE = Console(width=120)


def main() -> int:
    """Measure, show, judge."""
    warnings.simplefilter("ignore")
    where = environment()
    CONSOLE.print(where)
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    recipe = Recipe.from_yaml("resnet50-imagenet-2.04x", ["budget=0.5"])
    problem = Problem.of(model, recipe)
    split = Lagrangian(problem.constraints(model), rho=0.1)

    plain, penalized = steps(model, split)
    images = torch.randn(IMAGES, 3, 224, 224)
    started = time.perf_counter()
    metrics = statistics(model, list(problem.sites.values()), ((batch,) for batch in torch.split(images, 8)))
    measuring = time.perf_counter() - started
    rounds = {
        name: [seconds(partial(project, split, problem, given)) for _ in range(3)]
        for name, given in (("by the weights", None), ("by metrics", metrics))
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


def project(split: Lagrangian, problem: Problem, metrics: Mapping[str, Metric] | None) -> None:
    """One round."""
    split.project_(problem.most, metrics)
    split.update_duals_()


def steps(model: nn.Module, split: Lagrangian) -> tuple[list[float], list[float]]:
    """Wall seconds of steps without and with the penalty, in turns."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))

    def step(*, penalty: bool) -> None:
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        if penalty:
            split.penalty_()
        optimizer.step()
        optimizer.zero_grad()

    walls: tuple[list[float], list[float]] = ([], [])
    for turn in track(range(TURNS + 2), "steps, in turns", console=CONSOLE):
        for penalty in (False, True) if turn % 2 else (True, False):
            wall = seconds(partial(step, penalty=penalty))
            if turn >= 2:  # the first turns warm up
                walls[penalty].append(wall)
    return walls


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of some work."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _spread(walls: list[float]) -> str:
    return f"{median(walls):.2f} s ({min(walls):.2f} to {max(walls):.2f})"


def _ok(measured: float, limit: float) -> str:
    return "ok" if measured <= limit else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
