"""A plan, and the folder of the network that it makes, with its report."""

from pathlib import Path

import pytest
import torch

import batude_fx
from batude_fx.report import sweep_points
from tests.toy_networks import small_net


@pytest.fixture(scope="session")
def plan() -> batude_fx.Plan:
    """A plan for `small_net`."""
    return batude_fx.plan(
        small_net(), 0.7, example_inputs=torch.zeros(1, 3, 16, 16), calibration=torch.rand(8, 3, 16, 16), round_to=2
    )


@pytest.fixture
def folder(plan: batude_fx.Plan, tmp_path: Path) -> Path:
    """The folder that the network of the plan is saved to."""
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(plan.apply(small_net()), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="session")
def points() -> list[sweep_points.Point]:
    """Two points of a sweep."""
    return [
        sweep_points.Point(0.5, 50, 5, 1.5, 0.75, 0.5, 1.0),
        sweep_points.Point(1.0, 100, 10, 2.5, 1.0, 0.75, 1.0),
    ]
