"""A budget that cannot be met is refused with the smallest one that can, and that one works."""

import pytest
import torch
from torch import nn

import batude_fx
from batude_fx.budget.budget import Budget
from batude_fx.errors import BatudeError, BudgetError
from tests.compression.common import EXAMPLE, smallest_reachable
from tests.toy_networks import varied_net


@pytest.mark.parametrize("limits", [{"flops": 0.01}, {"params": 0.01}])
def test_an_unreachable_budget_names_the_smallest_one_and_that_works(limits: dict[str, float]) -> None:
    model = varied_net()
    with pytest.raises(BudgetError, match=r"Use at least [0-9.]+\.$") as caught:
        batude_fx.compress(model, Budget(**limits), example_inputs=EXAMPLE, calibration=None)
    smallest = smallest_reachable(caught.value)
    unit = next(iter(limits))
    assert batude_fx.plan(model, Budget(**{unit: smallest}), example_inputs=EXAMPLE, calibration=None).ranks
    with pytest.raises(BudgetError):
        batude_fx.plan(model, Budget(**{unit: smallest - 2e-4}), example_inputs=EXAMPLE, calibration=None)


def test_sites_too_small_for_round_to_are_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))  # no multiple of 8 is below 8
    with pytest.raises(BudgetError, match=r"still need .* Use a smaller round_to, or more sites"):
        batude_fx.compress(model, 0.5, example_inputs=EXAMPLE, calibration=None)


def test_a_budget_that_only_linear_layers_can_meet_names_the_option() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.Flatten(2), nn.Linear(64, 256), nn.Linear(256, 64))
    options = {"example_inputs": torch.zeros(1, 3, 32, 32), "calibration": None}
    with pytest.raises(BudgetError, match=r'With linear layers, layers="conv\+linear", it can be met\.$'):
        batude_fx.compress(model, 0.5, **options)
    assert batude_fx.plan(model, 0.5, layers="conv+linear", **options).ranks
    for further in ({"layers": "conv+linear"}, {"include": "0"}, {}):
        with pytest.raises(BudgetError, match=r"Use at least [0-9.]+\.$"):
            batude_fx.compress(model, 0.01, **options, **further)


def test_a_smallest_budget_of_few_digits_works() -> None:
    model = nn.Sequential(nn.Conv2d(4, 25, 1, bias=False))  # 100 flops a position, 29 at rank 1
    options = {"example_inputs": torch.zeros(1, 4, 1, 1), "calibration": None, "round_to": 1}
    with pytest.raises(BudgetError) as caught:
        batude_fx.plan(model, 0.1, **options)
    assert batude_fx.plan(model, smallest_reachable(caught.value), **options).flops == 29


def test_limits_that_exclude_each_other_name_what_is_reachable() -> None:
    # Ranks (8, 16) need 20480 flops and 1280 parameters, ranks (8, 8) need 29696 and 832, there are no others.
    model = nn.Sequential(nn.Conv2d(16, 16, 3, stride=3, padding=1, bias=False))
    limits = Budget(flops="20480flops", params="832params")
    with pytest.raises(BudgetError, match="raise one of them"):
        batude_fx.plan(model, limits, example_inputs=torch.zeros(1, 16, 12, 12), calibration=None)


def test_where_nothing_can_be_replaced_no_impossible_budget_is_advised() -> None:
    with pytest.raises(BatudeError) as caught:
        batude_fx.plan(nn.Conv2d(3, 3, 3, groups=3), 0.5, example_inputs=EXAMPLE, calibration=None)
    assert "at least 1.0" not in str(caught.value)


@pytest.mark.parametrize("budget", ["abc", 0, 1.5, "0.5x", float("nan"), "1x", "-3", "0GFLOPs", True, ""])
def test_a_budget_that_makes_no_sense_is_refused_in_one_line(budget: float | str) -> None:
    with pytest.raises(BudgetError, match=r"Write a fraction that remains \(0\.5\)") as caught:
        batude_fx.compress(varied_net(), budget, example_inputs=EXAMPLE)
    assert "\n" not in str(caught.value)
