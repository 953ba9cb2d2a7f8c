"""Folders of images: list them, read their classes, and prepare the images as timm does for a model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch import Tensor, nn

from batude_fx.errors import CalibrationError
from batude_fx.graph.example_inputs import example_inputs

BATCH = 16
_COLOURS = 3
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_MOST_ASPECT = 100
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def image_paths(folder: Path, count: int | None = None) -> list[Path]:
    """Return the sorted paths of the images in a folder and its subfolders, without hidden ones.

    Args:
        folder: The folder.
        count: Number of images to choose at equal distances from the sorted list; None or a larger number for all.

    Raises:
        CalibrationError: When the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is no folder. Give a folder of images; they may be in subfolders.")
    images = (path for path in _files(folder) if path.suffix.lower() in _SUFFIXES and path.is_file())
    paths = sorted(path for path in images if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not paths:
        raise CalibrationError(f"{folder} holds no image ({', '.join(sorted(_SUFFIXES))}), nor do its subfolders.")
    if count is None or count >= len(paths):
        return paths
    return [paths[index * len(paths) // count] for index in range(count)]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders; follow links, as timm does, except to a folder further up."""
    for name, subfolders, files in os.walk(folder, followlinks=True):
        parent = Path(name)
        subfolders[:] = [sub for sub in subfolders if not parent.resolve().is_relative_to((parent / sub).resolve())]
        yield from (parent / file for file in files)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the subfolders in the order of timm's class indices, which puts "2" before "10"."""
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted((name for name in names if not name.startswith(".")), key=natural_key)


def class_indices(paths: Sequence[Path], folder: Path) -> list[int] | None:
    """Return the class index of every image, or None if any image is in no subfolder.

    The class is the index of the image's topmost subfolder in `class_folders`.
    """
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) == 1 for part in parts):
        return None
    classes = class_folders(folder)
    return [classes.index(part[0]) for part in parts]


def batches(model: nn.Module, paths: Sequence[Path]) -> Iterator[Tensor]:
    """Yield batches (n, C, H, W) of images, resized, cropped and normalized as timm does to evaluate the model.

    Raises:
        CalibrationError: When a file cannot be read as an image, or the model does not take one colour image.
    """
    transform = _transform(model)
    for start in range(0, len(paths), BATCH):
        yield torch.stack([transform(read_image(path)) for path in paths[start : start + BATCH]])


def _transform(model: nn.Module) -> Any:  # noqa: ANN401 - a torchvision transform, which is untyped
    image = example_inputs(model).image
    if image is None or image.shape[1] != _COLOURS:
        raise CalibrationError(
            f"{type(model).__name__} does not take one colour image, so it cannot be run on photos; "
            "plan and compress do not need any with --calibration synthetic or none."
        )
    config = resolve_data_config({"input_size": tuple(image.shape[1:])}, model=model)  # type: ignore[no-untyped-call]
    if wrong := [key for key in ("mean", "std") if len(config[key]) not in {1, _COLOURS}]:
        raise CalibrationError(
            f"pretrained_cfg of {type(model).__name__} gives {wrong[0]} for {len(config[wrong[0]])} channels, its "
            f"images have {_COLOURS}; set it to one value per channel."
        )
    return create_transform(**config, is_training=False)


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Return an image in colour, or in grey for the mode "L".

    Pillow would otherwise let the content of the file choose among some forty readers, one of which starts Ghostscript.

    Raises:
        CalibrationError: When the file is no image of a listed format, is broken, or is a hundred times wider than high
            or higher than wide.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_aspect(image)
            return _with_eight_bits(image).convert(mode)
    except Exception as error:  # Pillow's readers raise all kinds, SyntaxError for a broken chunk of a PNG among them
        raise CalibrationError(f"{path} cannot be read as an image: {error}. Remove or replace it.") from error


def _with_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16-bit grey levels with eight bits; Pillow would cut everything above 255 to white."""
    if not image.mode.startswith("I"):
        return image
    values = np.array(image)  # a copy, which is changed in place, as the largest images take half a gigabyte
    np.floor_divide(values, 257, out=values)
    return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))


def _check_aspect(image: Image.Image) -> None:
    """Refuse an image that would fill the memory when it is resized by its shorter side."""
    if max(image.size) > _MOST_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, a side over {_MOST_ASPECT} times the other")
