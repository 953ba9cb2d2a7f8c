"""One-shot training of ResNet-20 on CIFAR-10, compared with four ways to compress first and then train.

Run `make bench-cifar10`, or `python -m benchmarks.cifar10 [--seeds 0 1 2] [--budgets 2.5x 3.6x] [--rows ...]`. Every
row starts from the same baseline and has the same number of epochs, optimizer, peak learning rate and distillation,
those of `recipes/resnet20-cifar10-*.yaml`, or others by `--set`, such as `finalize.optimizer=sgd finalize.lr=0.05
finalize.weight_decay=0.0005` for 3.6x; each optimizer has rows of its own. One-shot training uses some of its epochs to
find ranks. Flops are counted by fvcore. On two CPU cores the baseline takes about half an hour, and two rows as long
again. Therefore finished rows and the baseline are stored and committed under `benchmarks/runs/cifar10`, and the
benchmark can continue on any machine. The table and `docs/data/cifar10.json` hold all finished rows.

Rows:
    one-shot: the recipe, ranks learned during training.
    one-shot, 20 epochs: twice as long, to show the cost of the short schedule; only if `--rows` names it.
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
from batude_fx.training.teacher import Teacher
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
    """Return CIFAR-10 as tensors, with random crops and flips that depend only on the seed and the epoch."""
    images, labels = cifar10("train")
    padded = nn.functional.pad(images, (PAD,) * 4)  # (50000, 3, 40, 40)
    test_images, test_labels = cifar10("test")
    size, eval_size = recipe.data.batch_size, recipe.eval.batch_size
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
            yield normalized(batch.permute(0, 3, 1, 2)), labels[chosen]

    def evaluation() -> Iterator[Batch]:
        for batch, classes in zip(
            torch.split(test_images, eval_size), torch.split(test_labels, eval_size), strict=True
        ):
            yield normalized(batch), classes

    return Data(train=train, evaluation=evaluation, batches=len(images) // size)


def normalized(pixels: Tensor) -> Tensor:
    """Normalize pixels (n, 3, 32, 32), uint8, to float32."""
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
    return (pixels.float() / 255 - shift) / scale


def recipe_of(budget: str, seed: int, settings: list[str]) -> Recipe:
    """Return the package's recipe for a budget, starting from the baseline."""
    start = [f"model.checkpoint={BASELINE}", "pretrain=null"] if BASELINE.is_file() else []
    return Recipe.from_yaml(f"resnet20-cifar10-{budget}", [*start, "eval.interval=100", f"seed={seed}", *settings])


def session_of(recipe: Recipe) -> Session:
    """Return the session of a run that writes no files."""
    session = Session(recipe, None, resume=False)
    session.data, session.classes = in_memory(recipe), 10
    return session


def train_baseline(settings: list[str]) -> None:
    """Train and save the dense network that all rows start from."""
    recipe = recipe_of("2.5x", 0, ["eval.interval=4", *settings])
    if recipe.pretrain is None:
        return
    session, model = session_of(recipe), dense_network(recipe)
    run_phase(session, "pretrain", recipe.pretrain, model)
    temporary = BASELINE.with_suffix(".tmp")
    save_model(model, str(temporary))
    temporary.replace(BASELINE)


def one_shot(recipe: Recipe) -> dict[str, Any]:
    """Run the recipe, which learns ranks during training."""
    result = run(recipe, data=in_memory(recipe))
    ranks = [{name: pair for name, pair in record["ranks"].items() if pair} for record in result.rounds]
    trajectory = [{k: record[k] for k in ("primal", "dual", "rho", "keep")} for record in result.rounds]
    return {
        "accuracy": result.accuracy, "flops": result.flops, "params": result.params,
        "baseline": result.original_accuracy, "rounds": trajectory, "first_ranks": ranks[0], "last_ranks": ranks[-1],
    }  # fmt: skip


def twice_as_long(recipe: Recipe) -> dict[str, Any]:
    """Run one-shot training with twice the epochs; the additional ones are in Tucker form."""
    epochs = Duration(recipe.one_shot.epochs.amount + 2 * recipe.finalize.epochs.amount, "epochs")
    longer = recipe.model_copy(update={"finalize": recipe.finalize.model_copy(update={"epochs": epochs})})
    return one_shot(longer) | {"schedule": schedule(longer)}


def schedule(recipe: Recipe) -> dict[str, str]:
    """Return the lengths of the phases."""
    return {"one_shot": str(recipe.one_shot.epochs), "finalize": str(recipe.finalize.epochs)}


def compressed_first(recipe: Recipe, compress: Callable[[nn.Module, Recipe, Data], nn.Module]) -> dict[str, Any]:
    """Compress a network, then train it for as many epochs as one-shot training has in total."""
    session, model = session_of(recipe), dense_network(recipe)
    problem = Problem.of(model, recipe)
    baseline = accuracy(session, model)
    settings = recipe.finalize.distillation
    teacher = Teacher(model, problem.inputs, settings) if settings else None
    small = compress(model.eval(), recipe, session.data)
    before = accuracy(session, small)
    whole = Duration(recipe.one_shot.epochs.amount + recipe.finalize.epochs.amount, "epochs")
    run_phase(session, "finalize", recipe.finalize.model_copy(update={"epochs": whole}), small, teacher)
    return {
        "accuracy": accuracy(session, small), "untrained": before, "flops": count_flops(small, problem.inputs),
        "params": sum(parameter.numel() for parameter in small.parameters()), "baseline": baseline,
    }  # fmt: skip


def calibrated(model: nn.Module, recipe: Recipe, data: Data) -> nn.Module:
    """Compress with as many training images as the recipe calibrates with."""
    count = recipe.one_shot.calibration_images
    images = torch.cat([batch for _, (batch, _) in zip(range(1 + count // 128), data.train(0, 0), strict=False)])
    return batude_fx.compress(model, recipe.budget, calibration=images[:count], round_to=recipe.one_shot.round_to)


def weights_only(model: nn.Module, recipe: Recipe, _: Data) -> nn.Module:
    """Compress without images."""
    return batude_fx.compress(model, recipe.budget, calibration=None, round_to=recipe.one_shot.round_to)


def uniform(model: nn.Module, recipe: Recipe, _: Data) -> nn.Module:
    """Decompose all sites at the largest common share of their ranks that meets the budget."""
    problem = Problem.of(model, recipe)
    limit = recipe.budget.limits(*problem.dense_costs).flops or 0

    def at(share: float) -> nn.Module:
        ranks = {
            name: Ranks(max(1, round(share * site.out_channels)), max(1, round(share * site.in_channels)))
            for name, site in problem.sites.items()
        }
        return factorize(model, ranks, hooi_sweeps=10)

    return _largest(at, lambda small: count_flops(small, problem.inputs) <= limit)


def pruned(model: nn.Module, recipe: Recipe, _: Data) -> nn.Module:
    """Prune with Torch-Pruning; the widths of the stages stay, since shortcuts without parameters connect them."""
    problem = Problem.of(model, recipe)
    limit = recipe.budget.limits(*problem.dense_costs).flops or 0

    def at(share: float) -> nn.Module:
        small = copy_model(model)
        ignored = [m for name, m in small.named_modules() if name in {"conv1", "fc"} or name.endswith("conv2")]
        torch_pruning.pruner.GroupNormPruner(
            small, problem.inputs, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True, pruning_ratio=1 - share, max_pruning_ratio=0.95, ignored_layers=ignored,
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
    """Measure one row, or read it from its file, and describe it in a line."""
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
    """Write all results into one file with versions, date and machine."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*x *.json"))]
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "settings": settings,
        "versions": {name: version(name) for name in ("batude-fx", "torch", "timm", "torch-pruning")},
        "recipes": {b: recipe_of(b, 0, settings).to_yaml() for b in sorted({result["budget"] for result in results})},
    }  # fmt: skip
    PUBLISHED.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n", encoding="utf-8")
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Print a table with a line per budget, optimizer and row, and the first and last ranks of one-shot training."""
    lines = defaultdict(list)
    for result in results:
        lines[result["budget"], result["optimizer"], result["row"]].append(result)
    table = Table(
        "budget", "optimizer", "row", "accuracy", "by seed", "untrained", "flops", "of budget", "parameters", "seconds"
    )
    for (budget, optimizer, row), group in sorted(lines.items(), key=lambda item: (*item[0][:2], -_mean(item[1]))):
        factor, untrained = float(budget[:-1]), [result["untrained"] for result in group if "untrained" in result]
        flops = mean(result["flops"] for result in group)
        spread = f" ± {100 * stdev(result['accuracy'] for result in group):.2f}" if len(group) > 1 else ""
        table.add_row(
            budget, optimizer, row, f"{_mean(group):.2%}{spread}",
            " ".join(f"{result['accuracy']:.2%}" for result in group),
            f"{mean(untrained):.1%}" if untrained else "", f"{flops / 1e6:.2f} M",
            f"{flops * factor / 40927872:.1%}", f"{mean(result['params'] for result in group) / 1e3:.0f} k",
            f"{mean(result['seconds'] for result in group):.0f}",
        )  # fmt: skip
    baseline = results[0]["baseline"] if results else 0
    table.title = f"CIFAR-10, ResNet-20, baseline {baseline:.2%}"
    CONSOLE.print(table)
    for result in results:
        if result["row"] == "one-shot" and result["seed"] == 0:
            which = f"{result['budget']}, {result['optimizer']}"
            CONSOLE.print(f"{which}, first round: {_ranks(result['first_ranks'])}", highlight=False)
            CONSOLE.print(f"{which}, last round:  {_ranks(result['last_ranks'])}", highlight=False)


def _mean(group: list[dict[str, Any]]) -> float:
    return float(mean(result["accuracy"] for result in group))


def _ranks(ranks: dict[str, list[int]]) -> str:
    return ", ".join(f"{name.removeprefix('layer')} {out}/{in_}" for name, (out, in_) in ranks.items())


def main() -> None:
    """Train the missing rows, publish the results, print the table."""
    parser = argparse.ArgumentParser(description="One-shot training against four ways to compress first, on CIFAR-10.")
    parser.add_argument("--budgets", nargs="+", default=["2.5x", "3.6x"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=[row for row in ROWS if row != LONGER], choices=list(ROWS))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="rows at a time, one thread each")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over the recipes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("ACCELERATE_DYNAMO_BACKEND", "inductor")  # steps take a fifth less time
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not BASELINE.is_file():
        train_baseline(options.set)
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    jobs = [(row, budget, seed) for seed in options.seeds for budget in options.budgets for row in options.rows]
    with ProcessPoolExecutor(options.workers, get_context("spawn"), follow_parent) as pool:
        futures = [pool.submit(measure, *job, options.set, threads) for job in jobs]
        for index, future in enumerate(as_completed(futures), 1):
            CONSOLE.print(f"{index}/{len(jobs)}  {future.result()}", highlight=False)
    show(publish(options.set))


if __name__ == "__main__":
    main()
