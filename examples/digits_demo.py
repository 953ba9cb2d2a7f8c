"""Demo: a small timm network for digits, compressed to 1 / 2.5 of its flops by `compress` and by a recipe.

Run `make demo`, or `python -m examples.digits_demo [FOLDER]`; about a minute on 2 idle cores.
`recipes/digits-demo.yaml` trains the network, then learns ranks and trains in Tucker form; `compress` compresses the
same network in three ways without training. All networks are saved under FOLDER (default `demo-out/`), and two of them
are loaded again. The exit code is 1 if a network exceeds its budget, or if the outputs of a loaded network are not
bit-identical to those of the saved one.
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
from typing import Literal

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
class Row:
    """One row of the table.

    Attributes:
        accuracy: Share of the test images that are classified correctly.
        flops: Multiply-adds of one image, by fvcore.
        parameters: Number of parameters.
        disk_bytes: Size of the saved network, without its report.
        image_seconds: Wall time per image, in batches of 64, on one thread.
    """

    accuracy: float
    flops: int
    parameters: int
    disk_bytes: int
    image_seconds: float


def main(folder: Path) -> int:
    """Train by the recipe, compress the original in three ways, compare all networks, load two of them."""
    torch.set_num_threads(1)  # for so small a network, starting threads takes longer than their work
    write_digits(folder / "digits")
    shutil.rmtree(folder / "one-shot", ignore_errors=True)  # from an earlier run of the demo
    recipe = batude_fx.Recipe.from_yaml(RECIPE, [f"data.root={folder / 'digits'}"])
    result = batude_fx.run(recipe, folder / "one-shot")

    model = timm.create_model("test_resnet", in_chans=1, num_classes=10).eval()
    load_model(model, str(folder / "one-shot" / "original.safetensors"))
    train_images, _ = read_digits(folder / "digits", "train")
    networks = {"original": model, **compress_in_three_ways(model, train_images), "one-shot": result.model}
    save(networks, folder)
    images, classes = read_digits(folder / "digits", "validation")
    rows = measure(networks, folder, images, classes)
    show(rows)

    in_budget = check_budget(rows)
    same = check_loaded(networks["calibrated"], folder / "calibrated", images)
    same &= check_loaded(networks["one-shot"], folder / "one-shot" / "model", images)
    CONSOLE.print(f"How the ranks came about: {folder / 'one-shot' / 'ranks.png'}", soft_wrap=True)
    return 0 if in_budget and same else 1


def compress_in_three_ways(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """Return the trained network at 1 / 2.5 of its flops; labels are not used."""
    shuffled = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    calibrations: dict[str, Tensor | Literal["synthetic"] | None] = {
        "weights only": None,
        "synthetic": "synthetic",
        "calibrated": shuffled[:CALIBRATION_IMAGES],
    }
    small = {}
    for name, calibration in track(calibrations.items(), f"Compressing {FACTOR}x in three ways", console=CONSOLE):
        small[name] = batude_fx.compress(model, f"{FACTOR}x", calibration=calibration, example_inputs=images[:1])
    return small


def save(networks: Mapping[str, nn.Module], folder: Path) -> None:
    """Save each network that `compress` made; the run has saved its own network and the original."""
    for name, network in networks.items():
        if name not in {"original", "one-shot"}:
            batude_fx.save(network, folder / name.replace(" ", "-"))


def measure(networks: Mapping[str, nn.Module], folder: Path, images: Tensor, classes: Tensor) -> dict[str, Row]:
    """Return accuracy, costs and time of each network."""
    seconds = image_seconds(list(networks.values()), images[:64])
    return {
        name: Row(
            accuracy=accuracy(network, images, classes),
            flops=fvcore_flops(network, images[:1]),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            disk_bytes=sum(file.stat().st_size for file in files_of(name, folder)),
            image_seconds=wall,
        )
        for (name, network), wall in zip(networks.items(), seconds, strict=True)
    }


def files_of(name: str, folder: Path) -> list[Path]:
    """Return the files of a saved network, without its report."""
    if name == "original":
        return [folder / "one-shot" / "original.safetensors"]
    saved = folder / "one-shot" / "model" if name == "one-shot" else folder / name.replace(" ", "-")
    return [saved / "model.safetensors", saved / "config.json"]


def fvcore_flops(network: nn.Module, image: Tensor) -> int:
    """Count the multiply-adds of one image with fvcore, independently of batude_fx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore uses torch.jit, which is deprecated, already when imported
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(network, image)
        return int(analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total())


@torch.no_grad()
def image_seconds(networks: Sequence[nn.Module], images: Tensor, rounds: int = 15) -> list[float]:
    """Return wall seconds per image, medians over rounds; the networks alternate, so that load affects all alike."""
    walls: list[list[float]] = [[] for _ in networks]
    for turn in track(range(rounds + 2), "Timing", console=CONSOLE):
        for network, wall in zip(networks, walls, strict=True):
            start = time.perf_counter()
            network(images)
            if turn >= 2:  # the first rounds warm up
                wall.append((time.perf_counter() - start) / len(images))
    return [median(wall) for wall in walls]


def show(rows: Mapping[str, Row]) -> None:
    """Print the table, with a row per network."""
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


def check_budget(rows: Mapping[str, Row]) -> bool:
    """Report whether all compressed networks are within the budget."""
    budget = rows["original"].flops / FACTOR
    largest = max(row.flops for name, row in rows.items() if name != "original")
    verdict = "within the budget" if largest <= budget else "OVER THE BUDGET"
    CONSOLE.print(
        f"Budget {budget:,.0f} flops; the largest network has {largest:,}, {largest / budget:.2%}: {verdict}.",
        soft_wrap=True,
    )
    return largest <= budget


@torch.no_grad()
def check_loaded(network: nn.Module, folder: Path, images: Tensor) -> bool:
    """Report whether the outputs of the loaded network are bit-identical to those of the saved one."""
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
