"""A network of timm and one of torchvision, compressed, and the folders that they were saved to."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.zoo.saved_networks import save_compressed


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("timm") / "out"
    return save_compressed(timm.create_model("resnet10t"), folder), folder


@pytest.fixture(scope="session")
def torchvision_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("torchvision") / "out"
    return save_compressed(torchvision.models.resnet18(), folder), folder
