"""Detectors, optical flow and video at 0.6 of their flops, printed: `make test-slow`.

What these return is checked on the same images as the dense network's: names, shapes and types. The number of boxes
is free, and so are the flops behind them: a detector computes its heads for as many proposals as it makes.
"""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import batude_fx
from batude_fx.graph.example_inputs import example_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # fvcore traces; detectors read sizes
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),  # likewise
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning"),
]
KEEP = 0.6
MODELS = (
    "fasterrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
    "maskrcnn_resnet50_fpn",
    "raft_small",
    "r3d_18",
)
LIGHT = ("ssdlite320_mobilenet_v3_large", "raft_small", "r3d_18")  # the others take minutes to be calibrated


@pytest.fixture(scope="module")
def rows(pytestconfig: pytest.Config) -> Iterator[list[tuple[str, ...]]]:
    seen: list[tuple[str, ...]] = []
    yield seen
    table = Table("model", "calibration", "GFLOPs", "compressed", "kept", "sites", title="fvcore's count")
    for row in seen:
        table.add_row(*row)
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        Console(width=110).print(table)


def _flops(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    analysis = FlopCountAnalysis(model.eval(), inputs)
    return int(analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total())


def _structure(output: object) -> object:
    """Nesting and dtypes; shapes too, but for the number of boxes in a list of detections."""
    leaves, spec = tree_flatten(dict(output) if isinstance(output, dict) else output)
    free = isinstance(output, list) and isinstance(output[0], dict)
    return spec, [(x.shape[free:], x.dtype) for x in cast("list[Tensor]", leaves)]


@pytest.mark.parametrize(
    ("name", "calibration"), [*((name, None) for name in MODELS), *((name, "synthetic") for name in LIGHT)]
)
def test_structured_networks_meet_the_budget_and_keep_their_outputs(
    name: str, calibration: Any, rows: list[tuple[str, ...]]
) -> None:
    torch.manual_seed(0)
    model = batude_fx.create(f"torchvision:{name}").eval()
    inputs = cast("tuple[Any, ...]", example_inputs(model))
    plan = batude_fx.plan(model, KEEP, calibration=calibration)
    small = plan.apply(model)
    dense, flops = _flops(model, inputs), _flops(small, inputs)
    sites = f"{len(plan.ranks)} of {len(plan.sites)}"
    shown = (f"{dense / 1e9:.3f}", f"{flops / 1e9:.3f}", f"{flops / dense:.4f}", sites)
    rows.append((name, str(calibration), *shown))
    with torch.no_grad():
        assert _structure(small.eval()(*inputs)) == _structure(model(*inputs))
    assert flops <= KEEP * dense
