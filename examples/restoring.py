"""Restoring without labels: a compressed network is taught by its original on the images of the calibration.

python -m examples.restoring [FOLDER]
"""

import argparse
from pathlib import Path

import batude_fx
from examples.digits import accuracy, read_digits, trained_network, write_digits


def main(folder: Path) -> None:
    """Train on digits, compress to 0.3 of the flops, and let the original teach that network on 200 images."""
    write_digits(folder)
    images, classes = read_digits(folder, "train")
    held_out = read_digits(folder, "validation")
    model = trained_network(images, classes)

    plan = batude_fx.plan(model, 0.3, calibration=images[:200], example_inputs=images[:1])
    calibrated = plan.apply(model)
    restored, measured = plan.build(model, restore=True)  # `apply` returns the network alone
    for name, network in (("original", model), ("calibrated", calibrated), ("restored", restored)):
        print(f"{name:<10}  {accuracy(network, *held_out):.1%}")
    print(f"It {measured.restoration}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compressed networks, taught by their original.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out/digits"), help="output folder")
    main(parser.parse_args().folder)
