"""The budget on real architectures, counted by fvcore and printed: `make test-slow`, about two minutes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from rich.console import Console
from rich.table import Table
from torch import nn

import batude_fx
from batude_fx.compression.plan import Plan
from batude_fx.errors import BudgetError
from batude_fx.graph.example_inputs import example_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is not supported:FutureWarning"),
]
MODELS = {
    "torchvision:resnet18": "conv",
    "torchvision:resnet50": "conv",
    "torchvision:vgg16_bn": "conv",
    "torchvision:densenet121": "conv",
    "torchvision:efficientnet_b0": "conv",
    "torchvision:regnet_y_400mf": "conv",
    "torchvision:mobilenet_v3_large": "conv",
    "torchvision:resnext50_32x4d": "conv",
    "timm:nfnet_l0": "conv",
    "timm:convnext_atto": "conv+linear",
}
BUDGETS = (0.8, 0.5, 0.3)
LARGE = 20_000_000  # parameters: ResNet-50 has 25.6 million


@dataclass(frozen=True)
class Row:
    """One network at one budget."""

    name: str
    keep: float
    dense: int
    planned: int
    flops: int
    sites: str
    note: str


@pytest.fixture(scope="module")
def rows(pytestconfig: pytest.Config) -> Iterator[list[Row]]:
    """The table, printed when all are there."""
    seen: list[Row] = []
    yield seen
    table = Table(
        "model", "budget", "GFLOPs", "compressed", "used", "sites", "", title="fvcore's count, random weights"
    )
    for row in seen:
        gflops, compressed = f"{row.dense / 1e9:.3f}", f"{row.flops / 1e9:.3f}"
        used = f"{row.flops / (row.keep * row.dense):.2%}"
        table.add_row(row.name, f"{row.keep:.4g}", gflops, compressed, used, row.sites, row.note)
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        Console(width=110).print(table)


def _flops(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    analysis = FlopCountAnalysis(model.eval(), inputs)
    return int(analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total())


def _plan_within_reach(plan: Plan, keep: float) -> tuple[Plan, float]:
    """The plan at a budget, or at the smallest reachable one that the refusal names."""
    try:
        return plan.at(keep), keep
    except BudgetError as error:
        reached = float(re.findall(r"at least ([0-9.]+)\.$", str(error))[0])
        assert reached > keep
        return plan.at(reached), reached


@pytest.mark.parametrize("name", MODELS)
def test_fvcore_finds_the_budget_used_and_never_exceeded(name: str, rows: list[Row]) -> None:
    torch.manual_seed(0)
    library, _, base = name.partition(":")
    model: nn.Module = timm.create_model(base) if library == "timm" else torchvision.models.get_model(base)
    for parameter in model.parameters():
        if not parameter.any():  # as NFNet initializes: cutting zeros loses nothing, and so nothing would be spent
            torch.nn.init.normal_(parameter, std=0.02)
    inputs, dense_params = example_inputs(model), sum(parameter.numel() for parameter in model.parameters())
    dense = _flops(model, inputs)
    first = batude_fx.plan(model, 0.99, calibration=None, layers=MODELS[name])
    own = []
    for keep in BUDGETS:
        plan, reached = _plan_within_reach(first, keep)
        sites, note = f"{len(plan.ranks)} of {len(plan.sites)}", "" if reached == keep else f"{keep} is out of reach"
        own.append(Row(name, reached, dense, plan.flops, _flops(plan.apply(model), inputs), sites, note))
    rows += own
    least_use = 0.99 if dense_params >= LARGE else 0.97
    for row in own:
        assert least_use < row.flops / (row.keep * row.dense) <= 1
        assert row.planned == row.flops
