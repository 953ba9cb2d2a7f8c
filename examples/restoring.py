"""Restoring without labels: a compressed network is taught by its original on the images of the calibration.

python -m examples.restoring [FOLDER]
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import batude_fx
from examples.digits import accuracy, read_digits, trained_network, write_digits


def main(folder: Path) -> None:
    """Train on digits, compress to three budgets, and let the original teach each network on 200 unlabelled images."""
    write_digits(folder)
    images, classes = read_digits(folder, "train")
    held_out = read_digits(folder, "validation")
    model = trained_network(images, classes)

    table = Table("kept", "calibrated", "restored", "steps", title="Accuracy on 450 held-out digits")
    plan = batude_fx.plan(model, 0.4, calibration=images[:200], example_inputs=images[:1])
    for keep in (0.4, 0.3, 0.25):
        at_keep = plan.at(keep)
        restored, measured = at_keep.build(model, restore=True)
        scores = (f"{accuracy(network, *held_out):.1%}" for network in (at_keep.apply(model), restored))
        restoration = measured.restoration
        steps = f"{restoration.kept} of {restoration.steps}" if restoration else ""
        table.add_row(f"{keep:.0%}", *scores, steps)
    Console().print(f"The original: {accuracy(model, *held_out):.1%}", table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compressed networks, taught by their original.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out/digits"), help="output folder")
    main(parser.parse_args().folder)
