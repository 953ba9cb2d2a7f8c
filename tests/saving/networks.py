"""The networks and images of the tests of saving."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

import batude_fx

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def compressed(model: nn.Module, example: Tensor = IMAGES[:1], **options: Any) -> nn.Module:
    """Return the model compressed to 0.6 of its flops, by its weights alone unless told otherwise, in eval mode."""
    options = {"calibration": None, "example_inputs": example, **options}
    return batude_fx.compress(model, 0.6, **options).eval()


def timm_net(name: str = "resnet10t", **arguments: Any) -> nn.Module:
    """Return a network of timm that has the same weights at every call."""
    torch.manual_seed(0)
    return timm.create_model(name, **arguments)
