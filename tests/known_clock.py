"""A clock whose times are known: a formula in the ranks stands in for the times of this machine."""

from pathlib import Path

import pytest
import torch
from torch import nn

import batude_fx
from batude_fx.budget import time_table
from batude_fx.budget.layer_timer import LayerTimer
from batude_fx.support.inputs import Inputs
from batude_fx.tucker.modules import TuckerModule

NANOSECONDS = 1e-9
OVERHEAD = 20_000  # nanoseconds of each layer that is called
INPUT = (torch.zeros(1, 3, 32, 32),)


def layer_seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """Return one nanosecond for each multiply-add, and an overhead for each part."""
    total = 0.0
    parts = layer.children() if isinstance(layer, TuckerModule) else [layer]
    for part in parts:
        if isinstance(part, nn.Conv2d):
            x = part(x)
            total += x.shape[2] * x.shape[3] * part.weight.numel() + OVERHEAD
    return NANOSECONDS * total


def network_seconds(network: nn.Module) -> float:
    """Return the time of all layers, a tenth more than alone, and three milliseconds that belong to no site."""
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    def listen(layer: nn.Module, args: tuple[torch.Tensor], _: object) -> None:
        seen.append((layer, args[0]))

    inside = {part for module in network.modules() if isinstance(module, TuckerModule) for part in module.children()}
    handles = [
        module.register_forward_hook(listen)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | TuckerModule) and module not in inside
    ]
    with torch.no_grad():
        network(*INPUT)
    for handle in handles:
        handle.remove()
    return 0.003 + sum(1.1 * layer_seconds(layer, x) for layer, x in seen)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[nn.Module]:
    """Replace both timers by the formulas; the value lists the layers that were timed."""
    asked: list[nn.Module] = []

    def seconds(layer: nn.Module, x: torch.Tensor) -> float:
        asked.append(layer)
        return layer_seconds(layer, x)

    monkeypatch.setenv("BATUDE_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(time_table, "_seconds", seconds)
    monkeypatch.setattr(
        LayerTimer, "_seconds", lambda _self, *networks: [network_seconds(network) for network in networks]
    )
    return asked


def timed_net() -> nn.Module:
    """Return four convolutions of growing width and a classifier, with the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(96, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()  # fmt: skip


def timer_of(model: nn.Module) -> LayerTimer:
    """Return the timer of the sites of a network that takes `INPUT`."""
    sites = batude_fx.discover(model, INPUT).replaceable()
    return LayerTimer(model, sites, Inputs(INPUT), adds_bias=False)
