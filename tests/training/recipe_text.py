"""The text of a recipe, and a way to write it to a file."""

from pathlib import Path

GOOD = """\
model:
  name: resnet10t
data:
  root: photos
budget: 2.5x
one_shot:
  epochs: 3
  interval: 50%
finalize:
  epochs: 500 steps
"""


def recipe_file(folder: Path, text: str) -> Path:
    """Write a recipe into a folder and return its path."""
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path
