"""A recipe of your own: written, validated, and run for a few epochs on digits.

python -m examples.recipe [FOLDER]
"""

import argparse
from pathlib import Path

import batude_fx
from examples.digits import write_digits

RECIPE = """
# timm's smallest ResNet on digits, half of its flops.
model:
  name: test_resnet
  args: {in_chans: 1, num_classes: 10}
data:
  root: DIGITS          # train/ and validation/, a folder per class
  image_size: 32
  batch_size: 64
  workers: 0
  scale: [0.7, 1.0]
  hflip: 0.0            # a mirrored digit is not a digit
budget: 0.5
pretrain: {epochs: 4, lr: 0.003, optimizer: adamw}
one_shot: {epochs: 3, lr: 0.001, optimizer: adamw}
finalize: {epochs: 2, lr: 0.001, optimizer: adamw}
"""


def main(folder: Path) -> None:
    """Write images and recipe into a folder, show an error message, and run the recipe."""
    write_digits(folder / "digits")
    path = folder / "mine.yaml"
    path.write_text(RECIPE.replace("DIGITS", str(folder / "digits")), encoding="utf-8")

    try:
        batude_fx.Recipe.from_yaml(path, ["one_shot.epochs=-3"])
    except batude_fx.RecipeError as error:
        print(f"A mistake is one line: {error}")

    result = batude_fx.run(batude_fx.Recipe.from_yaml(path), folder / "run")
    print(f"{result.original_accuracy:.1%} at {result.dense_flops:,} flops became")
    print(f"{result.accuracy:.1%} at {result.flops:,}; see {folder / 'run' / 'model' / 'report.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A recipe of your own, on digits.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out/recipe"), help="output folder")
    main(parser.parse_args().folder)
