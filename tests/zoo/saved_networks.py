"""The images that networks take here, and a way to save a compressed network."""

from pathlib import Path

import torch
from torch import nn

import batude_fx

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def save_compressed(model: nn.Module, folder: Path) -> nn.Module:
    """Save the model compressed to 0.6 of its flops, but for its stem, and return what was saved."""
    small = batude_fx.compress(model, 0.6, calibration=None, example_inputs=IMAGES[:1], exclude="conv1*").eval()
    batude_fx.save(small, folder)
    return small
