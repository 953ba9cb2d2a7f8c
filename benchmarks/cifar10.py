"""CIFAR-10, ResNet-20, one baseline: one-shot training against four ways to compress first and train then.

Run `make bench-cifar10`, or `python -m benchmarks.cifar10 [--seeds 0 1 2] [--budgets 2.5x 3.6x] [--rows ...]`. Every
row starts from the same baseline and gets the same number of epochs, optimizer, peak learning rate and distillation,
those of `recipes/resnet20-cifar10-*.yaml`, or others by `--set`, such as `finalize.optimizer=sgd finalize.lr=0.05
finalize.weight_decay=0.0005` for 3.6x; rows of different optimizers are kept apart. One-shot training spends some of
its epochs on finding ranks. Flops are counted by fvcore. On two CPU cores the baseline takes about half an hour and two
rows as long again, so what is done is kept under `benchmarks/runs/cifar10`, baseline included, committed, and gone on
with on any machine. The table and `docs/data/cifar10.json` hold what there is.

Rows:
    one-shot: the recipe, ranks learned during training.
    one-shot, 20 epochs: twice as long, to see what the short schedule costs; only where `--rows` names it.
    calibrated: `compress` with 256 training images, then training.
    weights only: `compress` without images, then training.
    uniform: Tucker-2 at the same share of every site's ranks, by HOSVD and HOOI, then training.
    Torch-Pruning: its group-norm pruner, global, on the inner channels of the blocks, then training.
"""

import argparse
import json
import os
import platform
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch_pruning
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from torch import Tensor, nn

import batude_fx
from batude_fx.deploy.fold import fold
from batude_fx.graph.flops import count_flops
from batude_fx.graph.surgery import copy_model
from batude_fx.training.data import Batch, Data
from batude_fx.training.duration import Duration
from batude_fx.training.factorize import factorize
from batude_fx.training.phase import accuracy, run_phase
from batude_fx.training.problem import Problem, dense_network
from batude_fx.training.recipe import Recipe
from batude_fx.training.run import run
from batude_fx.training.session import Session
from batude_fx.tucker.ranks import Ranks
from benchmarks.workers import follow_parent
from tests.real.inputs import cifar10

FOLDER = Path("benchmarks/runs/cifar10")
PUBLISHED = Path("docs/data/cifar10.json")
BASELINE = FOLDER / "baseline.safetensors"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PAD = 4
LONGER = "one-shot, 20 epochs"
CONSOLE = Console(width=120)


def in_memory(recipe: Recipe) -> Data:
    """CIFAR-10 as tensors: random crops of padded images and flips, the same ones whenever an epoch is asked for."""
    images, labels = cifar10("train")
    padded = nn.functional.pad(images, (PAD,) * 4)  # (50000, 3, 40, 40)
    test_images, test_labels = cifar10("test")
    size, shown = recipe.data.batch_size, recipe.eval.batch_size
    pixels = torch.arange(32)

    def train(epoch: int, skip: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 * recipe.seed + epoch)
        order = torch.randperm(len(images), generator=generator)
        corner = torch.randint(2 * PAD + 1, (len(images), 2, 1), generator=generator)
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        for start in range(skip * size, len(images) // size * size, size):
            chosen = order[start : start + size]
            rows, columns = (corner[chosen, axis] + pixels for axis in (0, 1))  # (n, 32)
            columns = torch.where(mirrored[chosen, None], columns.flip(1), columns)
            batch = padded[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, 32, 32, 3)
            yield _normalized(batch.permute(0, 3, 1, 2)), labels[chosen]

    def evaluation() -> Iterator[Batch]:
        for batch, classes in zip(torch.split(test_images, shown), torch.split(test_labels, shown), strict=True):
            yield _normalized(batch), classes

    return Data(train=train, evaluation=evaluation, batches=len(images) // size)


def _normalized(pixels: Tensor) -> Tensor:
    """(n, 3, 32, 32) float32 of uint8."""
    scale, shift = (torch.tensor(one).view(3, 1, 1) for one in (STD, MEAN))
    return (pixels.float() / 255 - shift) / scale


def recipe_of(budget: str, seed: int, settings: list[str]) -> Recipe:
    """The shipped recipe of a budget, from the baseline."""
    start = [f"model.checkpoint={BASELINE}", "pretrain=null"] if BASELINE.is_file() else []
    return Recipe.from_yaml(f"resnet20-cifar10-{budget}", [*start, "eval.interval=100", f"seed={seed}", *settings])


def session_of(recipe: Recipe) -> Session:
    """A run in memory."""
    session = Session(recipe, None, resume=False)
    session.data, session.classes = in_memory(recipe), 10
    return session


def train_baseline(settings: list[str]) -> None:
    """The dense network that all rows start from."""
    recipe = recipe_of("2.5x", 0, ["eval.interval=4", *settings])
    if recipe.pretrain is None:
        return
    session, model = session_of(recipe), dense_network(recipe)
    run_phase(session, "pretrain", recipe.pretrain, model)
    temporary = BASELINE.with_suffix(".tmp")
    save_model(model, str(temporary))
    temporary.replace(BASELINE)


def one_shot(recipe: Recipe) -> dict[str, Any]:
    """Ranks learned during training."""
    result = run(recipe, data=in_memory(recipe))
    ranks = [{name: pair for name, pair in record["ranks"].items() if pair} for record in result.rounds]
    trajectory = [{k: record[k] for k in ("primal", "dual", "rho", "keep")} for record in result.rounds]
    return {
        "accuracy": result.accuracy, "flops": result.flops, "params": result.params,
        "baseline": result.original_accuracy, "rounds": trajectory, "first_ranks": ranks[0], "last_ranks": ranks[-1],
    }  # fmt: skip


def twice_as_long(recipe: Recipe) -> dict[str, Any]:
    """One-shot training with as many epochs again, all of them in Tucker form."""
    epochs = Duration(recipe.one_shot.epochs.amount + 2 * recipe.finalize.epochs.amount, "epochs")
    longer = recipe.model_copy(update={"finalize": recipe.finalize.model_copy(update={"epochs": epochs})})
    return one_shot(longer) | {"schedule": schedule(longer)}


def schedule(recipe: Recipe) -> dict[str, str]:
    """How long its phases are."""
    return {"one_shot": str(recipe.one_shot.epochs), "finalize": str(recipe.finalize.epochs)}


def compressed_first(recipe: Recipe, compress: Callable[[nn.Module, Recipe, Data], nn.Module]) -> dict[str, Any]:
    """A network that is compressed, then trained for as many epochs as one-shot training takes in all."""
    session, model = session_of(recipe), dense_network(recipe)
    problem = Problem.of(model, recipe)
    baseline, teacher = accuracy(session, model), fold(model, problem.inputs).requires_grad_(requires_grad=False)
    small = compress(model.eval(), recipe, session.data)
    before = accuracy(session, small)
    whole = Duration(recipe.one_shot.epochs.amount + recipe.finalize.epochs.amount, "epochs")
    run_phase(session, "finalize", recipe.finalize.model_copy(update={"epochs": whole}), small, teacher)
    return {
        "accuracy": accuracy(session, small), "untrained": before, "flops": count_flops(small, problem.inputs),
        "params": sum(parameter.numel() for parameter in small.parameters()), "baseline": baseline,
    }  # fmt: skip


def calibrated(model: nn.Module, recipe: Recipe, data: Data) -> nn.Module:
    """`compress` with as many training images as the recipe calibrates with."""
    count = recipe.one_shot.calibration_images
    images = torch.cat([batch for _, (batch, _) in zip(range(1 + count // 128), data.train(0, 0), strict=False)])
    return batude_fx.compress(model, recipe.budget, calibration=images[:count], round_to=recipe.one_shot.round_to)


def weights_only(model: nn.Module, recipe: Recipe, _: Data) -> nn.Module:
    """`compress` without images."""
    return batude_fx.compress(model, recipe.budget, calibration=None, round_to=recipe.one_shot.round_to)


def uniform(model: nn.Module, recipe: Recipe, _: Data) -> nn.Module:
    """The largest share of all sites' ranks that meets the budget."""
    problem = Problem.of(model, recipe)
    limit = recipe.budget.limits(*problem.dense).flops or 0

    def at(share: float) -> nn.Module:
        ranks = {
            name: Ranks(max(1, round(share * site.out_channels)), max(1, round(share * site.in_channels)))
            for name, site in problem.sites.items()
        }
        return factorize(model, ranks, hooi_sweeps=10)

    return _largest(at, lambda small: count_flops(small, problem.inputs) <= limit)


def pruned(model: nn.Module, recipe: Recipe, _: Data) -> nn.Module:
    """Torch-Pruning; the stages' widths stay, since shortcuts without parameters tie them together."""
    problem = Problem.of(model, recipe)
    limit = recipe.budget.limits(*problem.dense).flops or 0

    def at(share: float) -> nn.Module:
        small = copy_model(model)
        kept = [m for name, m in small.named_modules() if name in {"conv1", "fc"} or name.endswith("conv2")]
        torch_pruning.pruner.GroupNormPruner(
            small, problem.inputs, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True, pruning_ratio=1 - share, max_pruning_ratio=0.95, ignored_layers=kept,
        ).step()  # fmt: skip
        return small

    return _largest(at, lambda small: count_flops(small, problem.inputs) <= limit)


def _largest(at: Callable[[float], nn.Module], fits: Callable[[nn.Module], bool]) -> nn.Module:
    low, high = 0.02, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


ROWS: dict[str, Callable[[Recipe], dict[str, Any]]] = {
    "one-shot": one_shot,
    LONGER: twice_as_long,
    "calibrated": lambda recipe: compressed_first(recipe, calibrated),
    "weights only": lambda recipe: compressed_first(recipe, weights_only),
    "uniform": lambda recipe: compressed_first(recipe, uniform),
    "Torch-Pruning": lambda recipe: compressed_first(recipe, pruned),
}


def measure(row: str, budget: str, seed: int, settings: list[str], threads: int) -> str:
    """One row, kept in a file of its own."""
    recipe = recipe_of(budget, seed, settings)
    optimizer = recipe.finalize.optimizer
    path = FOLDER / f"{budget} {optimizer} {row} {seed}.json"
    if not path.is_file():
        torch.set_num_threads(threads)
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        facts = {"schedule": schedule(recipe)} | ROWS[row](recipe)
        facts |= {"row": row, "budget": budget, "optimizer": optimizer, "seed": seed}
        facts["seconds"] = round(time.perf_counter() - started)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts), encoding="utf-8")
        temporary.replace(path)
    facts = json.loads(path.read_text(encoding="utf-8"))
    return f"{budget}  {optimizer}  {row:<19}  seed {seed}  accuracy {facts['accuracy']:.2%}  {facts['seconds']} s"


def publish(settings: list[str]) -> list[dict[str, Any]]:
    """Everything that was measured, in one file with versions, date and machine."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*x *.json"))]
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "settings": settings,
        "versions": {name: version(name) for name in ("batude-fx", "torch", "timm", "torch-pruning")},
        "recipes": {b: recipe_of(b, 0, settings).to_yaml() for b in sorted({one["budget"] for one in results})},
    }  # fmt: skip
    PUBLISHED.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n", encoding="utf-8")
    return results


def show(results: list[dict[str, Any]]) -> None:
    """One table: a line per budget and row, over its seeds; and how ranks moved."""
    lines = defaultdict(list)
    for one in results:
        lines[one["budget"], one["optimizer"], one["row"]].append(one)
    table = Table(
        "budget", "optimizer", "row", "accuracy", "by seed", "untrained", "flops", "of budget", "parameters", "seconds"
    )
    for (budget, optimizer, row), group in sorted(lines.items(), key=lambda item: (*item[0][:2], -_mean(item[1]))):
        factor, untrained = float(budget[:-1]), [one["untrained"] for one in group if "untrained" in one]
        used = mean(one["flops"] for one in group)
        spread = f" ± {100 * stdev(one['accuracy'] for one in group):.2f}" if len(group) > 1 else ""
        table.add_row(
            budget, optimizer, row, f"{_mean(group):.2%}{spread}", " ".join(f"{one['accuracy']:.2%}" for one in group),
            f"{mean(untrained):.1%}" if untrained else "", f"{used / 1e6:.2f} M",
            f"{used * factor / 40927872:.1%}", f"{mean(one['params'] for one in group) / 1e3:.0f} k",
            f"{mean(one['seconds'] for one in group):.0f}",
        )  # fmt: skip
    baseline = results[0]["baseline"] if results else 0
    table.title = f"CIFAR-10, ResNet-20, baseline {baseline:.2%}"
    CONSOLE.print(table)
    for one in results:
        if one["row"] == "one-shot" and one["seed"] == 0:
            which = f"{one['budget']}, {one['optimizer']}"
            CONSOLE.print(f"{which}, first round: {_ranks(one['first_ranks'])}", highlight=False)
            CONSOLE.print(f"{which}, last round:  {_ranks(one['last_ranks'])}", highlight=False)


def _mean(group: list[dict[str, Any]]) -> float:
    return float(mean(one["accuracy"] for one in group))


def _ranks(ranks: dict[str, list[int]]) -> str:
    return ", ".join(f"{name.removeprefix('layer')} {out}/{in_}" for name, (out, in_) in ranks.items())


def main() -> None:
    """Train what is missing, publish, show."""
    parser = argparse.ArgumentParser(description="One-shot training against four ways to compress first, on CIFAR-10.")
    parser.add_argument("--budgets", nargs="+", default=["2.5x", "3.6x"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=[row for row in ROWS if row != LONGER], choices=list(ROWS))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="rows at a time, one thread each")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over the recipes")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("ACCELERATE_DYNAMO_BACKEND", "inductor")  # steps take a fifth less time
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not BASELINE.is_file():
        train_baseline(given.set)
    threads = max(1, (os.cpu_count() or 1) // given.workers)
    jobs = [(row, budget, seed) for seed in given.seeds for budget in given.budgets for row in given.rows]
    with ProcessPoolExecutor(given.workers, get_context("spawn"), follow_parent) as pool:
        done = [pool.submit(measure, *job, given.set, threads) for job in jobs]
        for index, future in enumerate(as_completed(done), 1):
            CONSOLE.print(f"{index}/{len(jobs)}  {future.result()}", highlight=False)
    show(publish(given.set))


if __name__ == "__main__":
    main()
