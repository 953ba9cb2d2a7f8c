"""The main job on one page: a small timm network on digits, 2.5 times smaller, by `compress` and by a recipe.

Run `make demo`, or `python -m examples.digits_demo [FOLDER]`. `recipes/digits-demo.yaml` trains the network, then
learns ranks and trains in Tucker form; `compress` makes the same network smaller in three ways without training.
Everything is saved under FOLDER (default `demo-out/`), and two of the networks are read back. About a minute on 2 idle
cores. Exit code 1 when a network is over its budget or when a loaded one does not give the saved one's outputs to the
last bit.
"""

import argparse
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import timm
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_model
from torch import Tensor, nn

import batude_fx
from examples.digits import accuracy, read_digits, write_digits

CALIBRATION_IMAGES = 256
FACTOR = 2.5
RECIPE = Path(__file__).parents[1] / "recipes" / "digits-demo.yaml"

CONSOLE = Console()


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        accuracy: Share of the test images.
        flops: Multiply-adds of one image, by fvcore.
        parameters: Their number.
        disk_bytes: Of the saved folder.
        image_seconds: Wall time per image, in batches of 64, on one thread.
    """

    accuracy: float
    flops: int
    parameters: int
    disk_bytes: int
    image_seconds: float


def main(folder: Path) -> int:
    """Train by the recipe, compress what it started from in three ways, compare, load back."""
    torch.set_num_threads(1)  # so small a network waits for its threads longer than they work
    write_digits(folder / "digits")
    shutil.rmtree(folder / "one-shot", ignore_errors=True)  # of the demo before
    recipe = batude_fx.Recipe.from_yaml(RECIPE, [f"data.root={folder / 'digits'}"])
    result = batude_fx.run(recipe, folder / "one-shot")

    model = timm.create_model("test_resnet", in_chans=1, num_classes=10).eval()
    load_model(model, str(folder / "one-shot" / "original.safetensors"))
    train_images, _ = read_digits(folder / "digits", "train")
    networks = {"original": model, **compressed_in_three_ways(model, train_images), "one-shot": result.model}
    save(networks, folder)
    images, classes = read_digits(folder / "digits", "validation")
    rows = measured(networks, folder, images, classes)
    show(rows)

    in_budget = check_budget(rows)
    same = check_loaded(networks["calibrated"], folder / "calibrated", images)
    same &= check_loaded(networks["one-shot"], folder / "one-shot" / "model", images)
    CONSOLE.print(f"How the ranks came about: {folder / 'one-shot' / 'ranks.png'}", soft_wrap=True)
    return 0 if in_budget and same else 1


def compressed_in_three_ways(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """The trained network at 1 / 2.5 of its flops; no class of any image is looked at."""
    shuffled = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    ways: dict[str, Tensor | str | None] = {
        "weights only": None,
        "synthetic": "synthetic",
        "calibrated": shuffled[:CALIBRATION_IMAGES],
    }
    small = {}
    for way, calibration in track(ways.items(), f"Compressing {FACTOR}x in three ways", console=CONSOLE):
        small[way] = batude_fx.compress(model, f"{FACTOR}x", calibration=calibration, example_inputs=images[:1])
    return small


def save(networks: Mapping[str, nn.Module], folder: Path) -> None:
    """A folder for each network that `compress` made; the run has saved its own, and the original."""
    for name, network in networks.items():
        if name not in {"original", "one-shot"}:
            batude_fx.save(network, folder / name.replace(" ", "-"))


def measured(networks: Mapping[str, nn.Module], folder: Path, images: Tensor, classes: Tensor) -> dict[str, Measured]:
    """What each network is worth, and what it costs."""
    seconds = image_seconds(list(networks.values()), images[:64])
    return {
        name: Measured(
            accuracy=accuracy(network, images, classes),
            flops=fvcore_flops(network, images[:1]),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            disk_bytes=sum(file.stat().st_size for file in files_of(name, folder)),
            image_seconds=wall,
        )
        for (name, network), wall in zip(networks.items(), seconds, strict=True)
    }


def files_of(name: str, folder: Path) -> list[Path]:
    """What is on disk for a network, without its report."""
    if name == "original":
        return [folder / "one-shot" / "original.safetensors"]
    saved = folder / "one-shot" / "model" if name == "one-shot" else folder / name.replace(" ", "-")
    return [saved / "model.safetensors", saved / "config.json"]


def fvcore_flops(network: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one image, counted afresh by a tool that is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore uses torch.jit, which warns of its own age, at its import already
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(network, image)
        return int(analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total())


@torch.no_grad()
def image_seconds(networks: Sequence[nn.Module], images: Tensor, rounds: int = 15) -> list[float]:
    """Wall seconds per image: medians over rounds in which the networks take turns, so that a busy moment hits all."""
    walls: list[list[float]] = [[] for _ in networks]
    for turn in track(range(rounds + 2), "Timing", console=CONSOLE):
        for network, wall in zip(networks, walls, strict=True):
            start = time.perf_counter()
            network(images)
            if turn >= 2:  # the first rounds warm up
                wall.append((time.perf_counter() - start) / len(images))
    return [median(wall) for wall in walls]


def show(rows: Mapping[str, Measured]) -> None:
    """Before and after, one network a row."""
    table = Table(title=f"timm's test_resnet on digits, {FACTOR}x; only one-shot is trained on", box=SIMPLE)
    table.add_column("network", no_wrap=True)
    for heading in ("accuracy", "fvcore flops", "parameters", "disk bytes", "ms/image"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row.accuracy:.1%}",
            f"{row.flops:,}",
            f"{row.parameters:,}",
            f"{row.disk_bytes:,}",
            f"{1e3 * row.image_seconds:.3f}",
        )
    CONSOLE.print(table)


def check_budget(rows: Mapping[str, Measured]) -> bool:
    """Whether no compressed network has more flops than the budget."""
    budget = rows["original"].flops / FACTOR
    most = max(row.flops for name, row in rows.items() if name != "original")
    verdict = "within the budget" if most <= budget else "OVER THE BUDGET"
    CONSOLE.print(
        f"Budget {budget:,.0f} flops; the largest network has {most:,}, {most / budget:.2%}: {verdict}.",
        soft_wrap=True,
    )
    return most <= budget


@torch.no_grad()
def check_loaded(network: nn.Module, folder: Path, images: Tensor) -> bool:
    """Whether the saved folder gives the network back, to the last bit of its outputs."""
    same = torch.equal(batude_fx.load(folder)(images), network(images))
    verdict = "bit-equal" if same else "NOT EQUAL"
    CONSOLE.print(
        f"{folder} loaded back; its outputs on {len(images)} images and the saved network's: {verdict}.",
        soft_wrap=True,
    )
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A small network on digits, 2.5 times smaller.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out"), help="where the networks are saved")
    sys.exit(main(parser.parse_args().folder))
