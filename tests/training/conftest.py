"""What the tests of training share: images, a finished run, and one thread, with which a run is reproducible."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import batude_fx
from batude_fx.training.loop import Result
from tests.training.tiny_recipe import tiny_recipe, write_images


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured noise."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder)
    return folder


@pytest.fixture(scope="session")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder and the result of a run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, batude_fx.run(tiny_recipe(photos), folder)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
