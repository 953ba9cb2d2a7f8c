"""A saved network, and a copy of its folder for each test that breaks it."""

import shutil
from pathlib import Path

import pytest
from torch import nn

import batude_fx
from tests.saving.networks import compressed, timm_net


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A compressed network, and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    small = compressed(timm_net(num_classes=5))
    batude_fx.save(small, folder)
    return small, folder


@pytest.fixture
def folder(saved: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(saved[1], copy := tmp_path / "copy")
    return copy
