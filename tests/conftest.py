"""Photographs in class folders, for the tests of several folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Without this, a failing assert in these modules does not show its values.
pytest.register_assert_rewrite("tests.cli.commands", "tests.tucker.low_rank_layers")


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images in three class folders."""
    folder = tmp_path_factory.mktemp("class_folders")
    values = np.random.default_rng(0)
    for label in ("ant", "bee", "cat"):
        (folder / label).mkdir()
        for index in range(2):
            Image.fromarray(values.integers(0, 255, (80, 90, 3), np.uint8)).save(folder / label / f"{index}.png")
    return folder
