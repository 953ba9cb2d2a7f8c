"""The measurements of a sweep, one point per budget, which are saved as `sweep.json`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from batude_fx.errors import SavedModelError, first_line
from batude_fx.report.record import Count, Share
from batude_fx.support.atomic_files import check_writable, newest, write_text
from batude_fx.support.validation import first_mistake, read_limited

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

    budget: Annotated[float, Field(gt=0, le=1)]
    flops: Count
    params: Count
    milliseconds: Annotated[float, Field(gt=0, le=1e9)]
    agreement: Share
    top1: Share | None = None
    top5: Share | None = None


Points = Annotated[list[Point], Field(max_length=1000)]


def check_folder(folder: Path) -> None:
    """Write a temporary file into a folder, before hours are spent on what will be written there.

    Raises:
        SavedModelError: When the folder cannot be created or written.
    """
    try:
        check_writable(folder)
    except OSError as error:
        raise SavedModelError(f"{folder} cannot be written: {error.strerror}. Choose another place.") from error


def write(points: Sequence[Point], folder: Path) -> None:
    """Write `sweep.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps([asdict(point) for point in points], indent=2) + "\n")


def read(folder: Path) -> list[Point]:
    """Read `sweep.json`; return no points if the folder has none.

    Raises:
        SavedModelError: When the file is broken.
    """
    path = newest(folder) / FILE
    if not path.is_file():
        return []
    try:
        return TypeAdapter(Points).validate_json(read_limited(path), strict=True)
    except ValidationError as error:
        reason = str(first_mistake(error))
    except (OSError, ValueError) as error:
        reason = f"{first_line(error)}."
    raise SavedModelError(f"{path} is broken: {reason} Sweep again, or remove it.")
