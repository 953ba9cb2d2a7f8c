"""What restoring without labels gives back: three real networks on photos, and ResNet-20 on CIFAR-10.

Run `make bench-restoring`, or `python -m benchmarks.restoring [--rows PART ...]`, where each PART is contained in the
name of a row, such as "ResNet-50 0.5 256". Calibration and restoring see photos of the train split of a shop, the
figures are those of 400 photos of its test split; of CIFAR-10, random images of the training set and all of the test
set. Every row takes up to 15 minutes on two cores, so finished rows are kept under `benchmarks/runs/restoring`, and the
benchmark goes on where it was stopped. Writes `docs/data/bench/restoring.json` and `restoring_cifar10.json`.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batude_fx
from batude_fx.quality.comparison import QualityMeter
from batude_fx.quality.quality import Quality
from batude_fx.support.inputs import Inputs
from batude_fx.support.numbers import wilson_interval
from batude_fx.training.problem import dense_network
from benchmarks.cifar10 import normalized, recipe_of
from benchmarks.published import environment, publish
from benchmarks.quality import NETWORKS
from tests.real import inputs

FOLDER = Path("benchmarks/runs/restoring")
PHOTOS = 256, 675
CIFAR_IMAGES, CIFAR_BUDGETS, SEEDS = (5000, 1024, 256), ("2.5x", "3.6x"), (0, 1, 2)
Row = dict[str, Any]


def main(parts: list[str]) -> None:
    """Measure the rows whose names have all parts and are not measured yet, and print the tables of all rows."""
    where = environment()
    print(where)
    warnings.simplefilter("ignore")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, measure in _rows().items():
        path = FOLDER / f"{name}.json"
        if all(part in name for part in parts) and not path.exists():
            row = {**measure(), "where": where}
            path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
            print(name, {key: value for key, value in row.items() if key != "where"}, flush=True)
    finished = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    for file, table in (
        ("restoring", _photos_table({name: row for name, row in finished.items() if "quality" in row})),
        ("restoring_cifar10", _cifar_table({name: row for name, row in finished.items() if "accuracy" in row})),
    ):
        Console(width=170).print(table)
        publish(file, table, where)


def _rows() -> dict[str, Callable[[], Row]]:
    """Return the function that measures each row, by its name."""
    rows: dict[str, Callable[[], Row]] = {}
    for network, (build, normalization, keeps) in NETWORKS.items():
        for photos in PHOTOS:
            for keep in keeps:
                rows[f"{network} {keep:g} {photos}"] = partial(_photos, build, normalization, keep, photos)
    for images in CIFAR_IMAGES:
        for budget in CIFAR_BUDGETS:
            for seed in SEEDS:
                rows[f"CIFAR {budget} {images} {seed}"] = partial(_cifar, budget, images, seed)
    return rows


def _photos(build: Callable[[], nn.Module], normalization: tuple[Any, Any], keep: float, photos: int) -> Row:
    """Measure a network on 400 photos before and after it is restored."""
    model = build().eval()
    test = inputs.shop_photos("test", 400, *normalization)
    labelled, labels = inputs.labelled_photos(*normalization)
    meter = QualityMeter(model, [Inputs((batch,)) for batch in torch.split(test, 16)], synthetic=False)
    calibration = inputs.shop_photos("train", photos, *normalization)
    plan = batude_fx.plan(model, keep, calibration=calibration, example_inputs=test[:1])
    calibrated = plan.apply(model)
    start = time.perf_counter()
    restored, measured = plan.build(model, restore=True)
    seconds = time.perf_counter() - start
    qualities = [cast("Quality", meter.measure(network)).model_dump() for network in (calibrated, restored)]
    hits = [_hits(network, labelled, labels) for network in (calibrated, restored)]
    return {
        "quality": qualities, "labelled": hits, "seconds": seconds,
        "reported": measured.quality and measured.quality.model_dump(),
        "restoration": measured.restoration and measured.restoration.model_dump(),
    }  # fmt: skip


def _cifar(budget: str, count: int, seed: int) -> Row:
    """Measure the accuracy of ResNet-20 on the test set before and after it is restored."""
    recipe = recipe_of(budget, seed, ["model.precision=fp32", "model.channels_last=false"])
    model = dense_network(recipe).eval()
    images, _ = inputs.cifar10("train")
    test, labels = inputs.cifar10("test")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    calibration, test = normalized(images[chosen]), normalized(test)
    plan = batude_fx.plan(
        model, budget, calibration=calibration, example_inputs=test[:1], round_to=recipe.one_shot.round_to
    )
    start = time.perf_counter()
    restored = plan.apply(model, restore=True)
    seconds = time.perf_counter() - start
    networks = model, plan.apply(model), restored
    return {"accuracy": [_hits(network, test, labels) / len(test) for network in networks], "seconds": seconds}


@torch.no_grad()
def _hits(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    network.eval()
    outputs = torch.cat([network(batch) for batch in torch.split(images, 250)])
    return int((outputs.argmax(1) == labels).sum())


def _photos_table(rows: dict[str, Row]) -> Table:
    table = Table(
        "network", "kept", "photos", "KL", "restored", "agreement", "restored", "where sure", "restored", "labelled",
        "restored", "reported", "holds", "kept of steps", "s",
    )  # fmt: skip
    for name, row in rows.items():
        before, after, reported = (Quality.model_validate(each) for each in (*row["quality"], row["reported"]))
        low, high = reported.agreement.interval if reported.agreement else (0, 1)
        holds = after.agreement is not None and low <= after.agreement.value <= high
        restoration = row["restoration"]
        table.add_row(
            *name.rsplit(" ", 2), str(before.divergence), str(after.divergence), str(before.agreement),
            str(after.agreement), str(before.sure_agreement), str(after.sure_agreement), *map(str, row["labelled"]),
            str(reported.agreement), "yes" if holds else "NO", f"{restoration['kept']} of {restoration['steps']}",
            f"{row['seconds']:.0f}",
        )  # fmt: skip
    return table


def _cifar_table(rows: dict[str, Row]) -> Table:
    table = Table("budget", "images", "seed", "dense", "calibrated", "restored", "won back", "s")
    for name, row in rows.items():
        dense, before, after = row["accuracy"]
        low, high = wilson_interval(round(after * 10_000), 10_000)
        table.add_row(
            *name.split()[1:], f"{dense:.2%}", f"{before:.2%}", f"{after:.2%} ({low:.1%} to {high:.1%})",
            f"{(after - before) / (dense - before):.0%}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What restoring without labels gives back.")
    parser.add_argument("--rows", nargs="*", default=[], help="parts of the names of the rows to measure")
    main(parser.parse_args().rows)
