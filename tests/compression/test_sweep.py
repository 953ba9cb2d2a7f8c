"""Sweeps: which budgets are swept, and that the points are those of the networks of the plan."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import batude_fx
from batude_fx.compression import sweep
from batude_fx.errors import BudgetError
from batude_fx.evaluation import scores
from tests.toy_networks import small_net

IMAGE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def plan() -> batude_fx.Plan:
    return batude_fx.plan(small_net(), 0.7, example_inputs=IMAGE, calibration=torch.rand(8, 3, 16, 16), round_to=2)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.3:0.9:0.1", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("0.5:0.5:1", [0.5]),
        ("0.75,0.5,0.75", [0.5, 0.75]),
        ("0.4", [0.4]),
        ("0.1:0.35:0.1", [0.1, 0.2, 0.3]),
    ],
)
def test_lists_and_ranges_of_budgets_are_read(text: str, numbers: list[float]) -> None:
    assert sweep.parse_budgets(text) == numbers


NONSENSE = ["", "a", "nan", "0,0.5", "0.3:0.9", "0.9:0.3:0.1", "0.3:0.9:0", "0.3:0.9:-1", "0.3:1.2:0.1"]
NONSENSE += ["0.1,0.2:0.3:1", "0.1:0.9:0.0001", "0.1:nan:0.1", "0.1:inf:0.1"]


@pytest.mark.parametrize("text", NONSENSE)
def test_budgets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(repr(text))):
        sweep.parse_budgets(text)


@pytest.fixture
def photos(tmp_path: Path) -> Callable[[int], Path]:
    def make(classes: int) -> Path:
        values = np.random.default_rng(0)
        for label in range(classes):
            (tmp_path / "photos" / f"{label}").mkdir(parents=True)
            pixels = values.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{label}" / "0.png")
        return tmp_path / "photos"

    return make


def _network() -> nn.Module:
    model = small_net()
    vars(model)["pretrained_cfg"] = {"input_size": (3, 16, 16)}  # what images are resized to
    return model


def test_a_sweep_measures_the_networks_of_the_plan(plan: batude_fx.Plan, photos: Callable[[int], Path]) -> None:
    model = _network()
    points = sweep.sweep(model, plan, [0.6, 0.8], scores.find_photos(photos(5)))
    assert [point.budget for point in points] == [0.6, 0.8, 1.0]
    assert [point.flops for point in points] == [plan.at(0.6).flops, plan.at(0.8).flops, plan.dense_flops]
    assert points[-1].params == sum(parameter.numel() for parameter in model.parameters())
    assert points[-1].agreement == 1
    assert all(point.milliseconds > 0 and point.top5 == 1 for point in points)


def test_without_class_labels_a_sweep_measures_agreement_alone(
    plan: batude_fx.Plan, photos: Callable[[int], Path]
) -> None:
    with pytest.warns(UserWarning, match="has 2 class folders, the network has 5"):
        points = sweep.sweep(_network(), plan, [0.6], scores.find_photos(photos(2)))
    assert [point.top1 for point in points] == [None, None]


def test_a_budget_out_of_reach_stops_a_sweep_before_it_begins(plan: batude_fx.Plan) -> None:
    with pytest.raises(BudgetError, match="out of reach"):
        sweep.sweep(_network(), plan, [0.01, 0.02], scores.Photos(Path("/nowhere"), []))


def test_budgets_out_of_reach_are_left_out(plan: batude_fx.Plan, photos: Callable[[int], Path]) -> None:
    with pytest.warns(UserWarning, match=r"left out: 0\.01, 0\.02, as the budget of 0\.0200 of the flops is out of"):
        points = sweep.sweep(_network(), plan, [0.01, 0.02, 0.6], scores.find_photos(photos(5)))
    assert [point.budget for point in points] == [0.6, 1.0]


def test_a_sweep_plans_for_its_tightest_budget_in_reach() -> None:
    def decide(keep: float) -> Any:
        if keep < 0.3:
            raise BudgetError(f"{keep} is out of reach")
        return keep

    planned: Any = sweep.plan_tightest(decide, [0.1, 0.2, 0.4, 0.5])
    assert planned == 0.4
    with pytest.raises(BudgetError, match=r"0\.2 is out of reach"):
        sweep.plan_tightest(decide, [0.1, 0.2])
