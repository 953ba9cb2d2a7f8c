"""The main job on one page: train a small timm network on digits, compress it 2.5 times in three ways, compare.

Run `make demo`, or `python examples/digits_demo.py [FOLDER]`. The networks are saved under FOLDER (default `demo-out/`)
and the calibrated one is read back. Under a minute on 2 idle cores. Exit code 1 when a network is over its budget or
when the loaded one does not give the saved one's outputs to the last bit.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import timm
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import batude_fx

EPOCHS = 6
BATCH = 64
PEAK_LEARNING_RATE = 3e-3
SIDE = 32  # pixels; the digits have 8
TEST_IMAGES = 450
CALIBRATION_IMAGES = 256
FACTOR = 2.5

CONSOLE = Console()


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, upsampled: images (N, 1, 32, 32) inside [-1, 1] and classes (N,)."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


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
    """Train, compress in three ways, save, compare, load back."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a network waits for its threads longer than they work
    digits = read_digits()
    model = trained(timm.create_model("test_resnet", in_chans=1, num_classes=10), digits)

    networks = {"original": model} | compressed_in_three_ways(model, digits)
    save(networks, folder)
    rows = measured(networks, folder, digits)
    show(rows)

    in_budget = check_budget(rows)
    same = check_loaded(networks["calibrated"], folder / "calibrated", digits.test_images)
    return 0 if in_budget and same else 1


def read_digits() -> Digits:
    """Training and test digits, with the same share of every class."""
    pixels, classes = load_digits(return_X_y=True)
    small = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(small, size=SIDE, mode="bilinear")
    train, test = train_test_split(range(len(images)), test_size=TEST_IMAGES, stratify=classes, random_state=0)
    labels = torch.as_tensor(classes)
    return Digits(images[train], labels[train], images[test], labels[test])


def trained(model: nn.Module, digits: Digits) -> nn.Module:
    """A few epochs of AdamW with a one-cycle learning rate."""
    steps = EPOCHS * (len(digits.train_images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    model.train()
    for batch in track(shuffled(len(digits.train_images)), f"Training {EPOCHS} epochs", steps, console=CONSOLE):
        loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_classes[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


def shuffled(count: int) -> Iterator[Tensor]:
    """Indices of full batches, in a new order every epoch."""
    for _ in range(EPOCHS):
        yield from torch.randperm(count)[: count // BATCH * BATCH].view(-1, BATCH)


def compressed_in_three_ways(model: nn.Module, digits: Digits) -> dict[str, nn.Module]:
    """The trained network at 1 / 2.5 of its flops; no class of any image is looked at."""
    ways: dict[str, Tensor | str | None] = {
        "weights only": None,
        "synthetic": "synthetic",
        "calibrated": digits.train_images[:CALIBRATION_IMAGES],
    }
    example = digits.train_images[:1]
    small = {}
    for way, calibration in track(ways.items(), f"Compressing {FACTOR}x in three ways", console=CONSOLE):
        small[way] = batude_fx.compress(model, f"{FACTOR}x", calibration=calibration, example_inputs=example)
    return small


def save(networks: Mapping[str, nn.Module], folder: Path) -> None:
    """A folder for each network; the original is a plain safetensors file."""
    (folder / "original").mkdir(parents=True, exist_ok=True)
    save_model(networks["original"], str(folder / "original" / "model.safetensors"))
    for name, network in networks.items():
        if name != "original":
            batude_fx.save(network, folder / name.replace(" ", "-"))


def measured(networks: Mapping[str, nn.Module], folder: Path, digits: Digits) -> dict[str, Measured]:
    """What each network is worth, and what it costs."""
    seconds = image_seconds(list(networks.values()), digits.test_images[:BATCH])
    return {
        name: Measured(
            accuracy=accuracy(network, digits),
            flops=fvcore_flops(network, digits.test_images[:1]),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            disk_bytes=sum(file.stat().st_size for file in (folder / name.replace(" ", "-")).iterdir()),
            image_seconds=wall,
        )
        for (name, network), wall in zip(networks.items(), seconds, strict=True)
    }


@torch.no_grad()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """Share of the test images that get their class."""
    hits = network(digits.test_images).argmax(1) == digits.test_classes
    return int(hits.sum()) / len(hits)


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
    table = Table(title=f"timm's test_resnet on digits, compressed {FACTOR}x, not trained again", box=SIMPLE)
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
        f"Budget {budget:,.0f} flops; the largest of the three has {most:,}, {most / budget:.2%}: {verdict}.",
        soft_wrap=True,
    )
    return most <= budget


@torch.no_grad()
def check_loaded(network: nn.Module, folder: Path, images: Tensor) -> bool:
    """Whether the saved folder gives the network back, to the last bit of its outputs."""
    same = torch.equal(batude_fx.load(folder)(images), network(images))
    verdict = "bit-equal" if same else "NOT EQUAL"
    CONSOLE.print(
        f"{folder} loaded back; its outputs on {len(images)} test images and the saved network's: {verdict}.",
        soft_wrap=True,
    )
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network on digits and compress it in three ways.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out"), help="where the networks are saved")
    sys.exit(main(parser.parse_args().folder))
