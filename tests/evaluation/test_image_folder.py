"""Image folders: which files are read, in which order and class, and which damage is named."""

import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset

import batude_fx
from batude_fx.evaluation import image_folder
from tests.toy_networks import ConstantClassifier


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-30],  # Pillow: OSError
        lambda whole: whole.replace(b"IDAT", b"\xd0\xb8\x0e\x10"),  # SyntaxError
        lambda whole: whole[:11] + b"\x01" + whole[12:],  # ValueError
        lambda whole: whole[:16] + b"\x7f" * 8 + whole[24:],  # DecompressionBombError
    ],
)
def test_every_kind_of_damage_to_an_image_names_the_file(
    damage: Callable[[bytes], bytes], class_folders: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "x.png"
    broken.write_bytes(damage((class_folders / "ant" / "0.png").read_bytes()))
    with pytest.raises(batude_fx.CalibrationError, match=r"x\.png cannot be read as an image"):
        next(image_folder.batches(ConstantClassifier(0), [broken]))


@pytest.mark.parametrize(("count", "taken"), [(None, 6), (9, 6), (6, 6), (3, 3), (1, 1)])
def test_images_are_spread_over_the_folder(count: int | None, taken: int, class_folders: Path) -> None:
    paths = image_folder.image_paths(class_folders, count)
    assert len(set(paths)) == taken
    assert paths == sorted(paths)
    assert taken < 3 or {path.parent.name for path in paths} == {"ant", "bee", "cat"}


def test_classes_are_numbered_as_timm_numbers_them(tmp_path: Path) -> None:
    for label in ("10", "2", "b", "A", ".hidden"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / label / "0.png")
    theirs = create_dataset("", root=str(tmp_path)).reader.class_to_idx
    assert (
        image_folder.class_folders(tmp_path) == ["2", "10", "A", "b"] == [name for name in theirs if name != ".hidden"]
    )
    paths = image_folder.image_paths(tmp_path)
    assert [path.parent.name for path in paths] == ["10", "2", "A", "b"]
    assert image_folder.class_indices(paths, tmp_path) == [1, 0, 2, 3]


def test_linked_folders_are_looked_into(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "ant").symlink_to(class_folders / "ant")
    shutil.copytree(class_folders / "bee", tmp_path / "bee")
    paths = image_folder.image_paths(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"]
    assert image_folder.class_indices(paths, tmp_path) == [0, 0, 1, 1]


def test_links_that_lead_back_up_are_not_followed(class_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(class_folders, tmp_path / "photos")
    for place in (tmp_path / "photos", tmp_path / "photos" / "ant"):
        (place / "here").symlink_to(place)
        (place / "up").symlink_to(tmp_path)
    assert len(image_folder.image_paths(tmp_path)) == 6


def test_grey_levels_of_sixteen_bits_are_those_of_eight(tmp_path: Path) -> None:
    levels = np.linspace(0, 255, 64 * 64).round().reshape(64, 64)
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((levels * 257).astype(np.uint16)).save(tmp_path / "16.png")
    (batch,) = image_folder.batches(ConstantClassifier(0), [tmp_path / "8.png", tmp_path / "16.png"])
    assert torch.equal(batch[0], batch[1])
    assert batch[0].std() > 0.5


def test_grey_levels_of_sixteen_bits_take_little_memory(tmp_path: Path) -> None:
    """The largest that Pillow reads have 178 million pixels: as integers of 64 bits, 3 GiB."""
    Image.fromarray(np.full((1000, 1000), 40_000, np.uint16)).save(tmp_path / "16.png")
    tracemalloc.start()
    image_folder.read_image(tmp_path / "16.png")
    bytes_per_pixel = tracemalloc.get_traced_memory()[1] / 1000**2
    tracemalloc.stop()
    assert bytes_per_pixel < 8


def test_the_content_of_a_file_chooses_no_other_reader(tmp_path: Path) -> None:
    """Pillow gives Encapsulated PostScript to Ghostscript, whatever the file is called."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    disguised = (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(batude_fx.CalibrationError, match=r"x\.png cannot be read as an image"):
        next(image_folder.batches(ConstantClassifier(0), [disguised]))


def test_an_image_that_would_fill_the_memory_when_resized_is_refused(tmp_path: Path) -> None:
    Image.new("L", (200_000, 1)).save(tmp_path / "long.png")
    with pytest.raises(batude_fx.CalibrationError, match="200000 x 1 pixels, a side over 100 times the other"):
        next(image_folder.batches(ConstantClassifier(0), [tmp_path / "long.png"]))


def test_a_mean_of_other_channels_is_refused(class_folders: Path) -> None:
    model = ConstantClassifier(0)
    vars(model)["pretrained_cfg"] = {"input_size": (3, 32, 32), "mean": (0.5, 0.5)}
    with pytest.raises(batude_fx.CalibrationError, match="gives mean for 2 channels, its images have 3"):
        next(image_folder.batches(model, image_folder.image_paths(class_folders)))
