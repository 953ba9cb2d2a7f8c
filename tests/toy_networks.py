"""A net that is small enough to keep everything, and its sites as discovery would list them."""

import torch
from torch import nn

from batude_fx.graph.sites import ConvSite


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def site_of(name: str, layer: nn.Conv2d) -> ConvSite:
    return ConvSite(
        name, "Conv2d", layer.in_channels, layer.out_channels, (3, 3), layer.groups,
        transposed=False, positions_in=49, positions_out=49, calls=1, found_by="fx",
    )  # fmt: skip
