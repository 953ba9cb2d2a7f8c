"""A plan is the same at any budget it was not made for, is for one model only, and prints all of its sites."""

import copy

import pytest
from torch import nn

import batude_fx
from batude_fx.errors import SelectionError, UnsupportedError
from tests.compression.common import (
    EXAMPLE,
    same_bits,
)
from tests.toy_networks import varied_net


@pytest.mark.parametrize("calibration", [None, "synthetic"])
def test_a_plan_at_another_budget_is_the_plan_of_that_budget(calibration: str | None) -> None:
    options = {"example_inputs": EXAMPLE, "calibration": calibration}
    plan, direct = batude_fx.plan(varied_net(), 0.8, **options).at("2x"), batude_fx.plan(varied_net(), "2x", **options)
    assert plan == direct
    assert same_bits(plan.apply(varied_net()), direct.apply(varied_net()))


def test_a_plan_is_frozen_and_prints_every_site_and_reason() -> None:
    plan = batude_fx.plan(varied_net(), 0.6, example_inputs=EXAMPLE, calibration=None)
    with pytest.raises(AttributeError):
        plan.flops = 0
    text = str(plan)
    assert all(site.name in text for site in plan.sites)
    assert "depthwise, nothing to decompose" in text


def test_a_plan_is_for_its_own_model() -> None:
    plan = batude_fx.plan(varied_net(), 0.6, example_inputs=EXAMPLE, calibration=None)
    with pytest.raises(SelectionError, match="has no site"):
        plan.apply(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(UnsupportedError, match="the plan was made for"):
        plan.apply(varied_net(width=8))


def test_a_plan_is_for_its_own_dtype() -> None:
    model = varied_net()
    plan = batude_fx.plan(model, 0.6, calibration=None, example_inputs=EXAMPLE)
    for other in (copy.deepcopy(model).double(), copy.deepcopy(model).half()):
        with pytest.raises(UnsupportedError, match=r"float(64|16)"):
            plan.apply(other)
