"""Folders of images for the command line: found, spread, and prepared as timm prepares them for the model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch import Tensor, nn

from batude_fx.errors import CalibrationError
from batude_fx.graph.example_inputs import example_inputs

BATCH = 16
_NDIM = 4  # (N, C, H, W)
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def image_paths(folder: Path, count: int | None = None) -> list[Path]:
    """The images below a folder, sorted; `count` of them, evenly spread, where that is fewer.

    Raises:
        CalibrationError: When the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is no folder. Give a folder of images, of any depth.")
    found = (path for path in _files(folder) if path.suffix.lower() in _SUFFIXES and path.is_file())
    paths = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not paths:
        raise CalibrationError(f"{folder} holds no image ({', '.join(sorted(_SUFFIXES))}) at any depth.")
    if count is None or count >= len(paths):
        return paths
    return [paths[index * len(paths) // count] for index in range(count)]


def _files(folder: Path) -> Iterator[Path]:
    """Links are followed, as timm does, but for those that lead back up."""
    for name, below, files in os.walk(folder, followlinks=True):
        here = Path(name)
        below[:] = [one for one in below if not here.resolve().is_relative_to((here / one).resolve())]
        yield from (here / file for file in files)


def class_folders(folder: Path) -> list[str]:
    """Names of its subfolders in the order of the classes, which is timm's: "2" before "10"."""
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted((name for name in names if not name.startswith(".")), key=natural_key)


def class_indices(paths: Sequence[Path], folder: Path) -> list[int] | None:
    """The class of every image, by its first subfolder, as `class_folders` orders them; None where one lies outside."""
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) == 1 for part in parts):
        return None
    classes = class_folders(folder)
    return [classes.index(part[0]) for part in parts]


def batches(model: nn.Module, paths: Sequence[Path]) -> Iterator[Tensor]:
    """Batches (n, C, H, W), resized, cropped and normalized for evaluation of this model.

    Raises:
        CalibrationError: When a file cannot be read as an image, with its path.
    """
    transform = _transform(model)
    for start in range(0, len(paths), BATCH):
        yield torch.stack([transform(_opened(path)) for path in paths[start : start + BATCH]])


def _transform(model: nn.Module) -> Any:  # noqa: ANN401 - a torchvision transform, which is untyped
    example, *more = example_inputs(model)
    if more or not isinstance(example, Tensor) or example.shape[1:2] != (3,) or example.ndim != _NDIM:
        raise CalibrationError(
            f"{type(model).__name__} does not take one colour image, so photos cannot be shown to it; "
            "plan and compress can do without: --calibration synthetic or none."
        )
    config = resolve_data_config({"input_size": tuple(example.shape[1:])}, model=model)  # type: ignore[no-untyped-call]
    return create_transform(**config, is_training=False)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise all kinds, SyntaxError for a broken chunk of a PNG among them
        raise CalibrationError(f"{path} cannot be read as an image: {error}. Remove or replace it.") from error
