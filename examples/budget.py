"""Choosing a budget: the accuracy of a trained network at six budgets, with three kinds of calibration.

python -m examples.budget [FOLDER]
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import batude_fx
from batude_fx.compression.calibrate import Calibration
from examples.digits import accuracy, read_digits, trained_network, write_digits


def main(folder: Path) -> None:
    """Train on digits, calibrate once per kind, choose ranks at every budget."""
    write_digits(folder)
    images, classes = read_digits(folder, "train")
    held_out = read_digits(folder, "validation")
    model = trained_network(images, classes)

    table = Table("kept", "weights only", "synthetic", "calibrated", "flops", title="Accuracy on 450 held-out digits")
    kinds: dict[str, Calibration] = {"weights only": None, "synthetic": "synthetic", "calibrated": images[::5]}
    plans = {
        kind: batude_fx.plan(model, 0.9, calibration=calibration, example_inputs=images[:1])
        for kind, calibration in kinds.items()
    }
    for keep in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        at_keep = {kind: plan.at(keep) for kind, plan in plans.items()}  # no image is processed again
        scores = (f"{accuracy(plan.apply(model), *held_out):.1%}" for plan in at_keep.values())
        table.add_row(f"{keep:.0%}", *scores, f"{at_keep['calibrated'].flops:,}")
    console = Console()
    console.print(f"The original: {accuracy(model, *held_out):.1%} at {plans['calibrated'].dense_flops:,} flops")
    console.print(table)

    try:
        plans["calibrated"].at(0.01)
    except batude_fx.BudgetError as error:
        console.print(f"At 0.01: {error}", markup=False)

    smallest = batude_fx.plan(
        model, batude_fx.Budget(max_drop=0.01), evaluate=lambda network: accuracy(network, *held_out),
        calibration=images[::5], example_inputs=images[:1],
    )  # fmt: skip
    console.print(f"At most 0.01 of the accuracy lost: {smallest.flops:,} flops, {smallest.search}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A trained network at several budgets.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out/digits"), help="output folder")
    main(parser.parse_args().folder)
