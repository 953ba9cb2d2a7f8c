"""The measurements of a sweep, one point per budget, which are saved as `sweep.json`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

from pydantic import TypeAdapter, ValidationError

from batude_fx.errors import SavedModelError
from batude_fx.support.atomic_files import atomic_file
from batude_fx.support.validation import first_mistake

FILE = "sweep.json"


@dataclass(frozen=True)
class Point:
    """The measurements at one budget of a sweep; budget 1 is the original network.

    Attributes:
        budget: Fraction of the flops that may remain.
        flops: Multiply-adds, by fvcore's count.
        params: Number of parameters.
        milliseconds: Median wall time of one image. It is timed in turns with the original and scaled so that the
            original takes the same time at every point.
        agreement: Share of the images for which the network and the original predict the same class.
        top1: Top-1 accuracy, where the images have labels.
        top5: Top-5 accuracy, where the images have labels.
    """

    budget: float
    flops: int
    params: int
    milliseconds: float
    agreement: float
    top1: float | None = None
    top5: float | None = None


def make_writable(folder: Path) -> None:
    """Create a folder and write a temporary file into it, before hours are spent on what will be written there.

    Raises:
        SavedModelError: When the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SavedModelError(f"{folder} cannot be written: {error.strerror}. Choose another place.") from error


def write(points: Sequence[Point], folder: Path) -> None:
    """Write `sweep.json`."""
    make_writable(folder)
    with atomic_file(folder / FILE) as text:
        text.write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> list[Point]:
    """Read `sweep.json`; return no points if the folder has none.

    Raises:
        SavedModelError: When the file is broken.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return TypeAdapter(list[Point]).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise SavedModelError(f"{path} is broken: {first_mistake(error)} Sweep again, or remove it.") from None
