"""One calibration, many budgets: how good and how fast the network is at each of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

from pydantic import TypeAdapter, ValidationError

from batude_fx.errors import SavedModelError
from batude_fx.support.atomic_files import atomic_file

FILE = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One budget of a sweep; the original network is the point at budget 1.

    Attributes:
        budget: The fraction of flops that may remain.
        flops: Multiply-adds, by fvcore's count.
        params: Parameters.
        milliseconds: Median wall time of one image, by how long the original took beside it.
        agreement: Share of the images for which the original names the same class.
        top1: Share of the images that are named right, where they have labels.
        top5: Share of the images whose class is among the first five.
    """

    budget: float
    flops: int
    params: int
    milliseconds: float
    agreement: float
    top1: float | None = None
    top5: float | None = None


def make_writable(folder: Path) -> None:
    """Make the folder that will be written, before hours go into it.

    Raises:
        SavedModelError: When that cannot be.
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
    """Read `sweep.json`; nothing where there is none.

    Raises:
        SavedModelError: When it is broken.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return TypeAdapter(list[Point]).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        raise SavedModelError(f"{path} is broken: {error.errors()[0]['msg']}. Sweep again, or remove it.") from None
