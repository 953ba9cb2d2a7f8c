"""The rank multiple for "auto" is the one that a known clock favours."""

import numpy as np
import pytest
import torch
from torch import nn

from batude_fx.budget import rank_multiple, time_table
from batude_fx.budget.rank_multiple import suitable_multiples
from batude_fx.tucker.modules import TuckerModule
from tests.known_clock import timed_net, timer_of


@pytest.mark.parametrize("staircase", [4, 8, 16, 32])
def test_the_multiple_is_the_smallest_that_is_nearly_as_fast(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch, staircase: int
) -> None:
    del clock

    def seconds(layer: nn.Module, _: torch.Tensor) -> float:
        if not isinstance(layer, TuckerModule):
            return 1.0
        return float(np.ceil(layer.ranks.rank_in / staircase) * staircase)

    monkeypatch.setattr(time_table, "_seconds", seconds)
    expected = [multiple for multiple in (32, 16, 8, 4) if multiple <= staircase]
    assert list(suitable_multiples(timer_of(timed_net()))) == expected


def test_the_layers_that_take_longest_decide_the_multiple(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    monkeypatch.setattr(rank_multiple, "_PROBED", 1)

    def seconds(layer: nn.Module, x: torch.Tensor) -> float:
        slow = 3.0 if x.shape[1] == 128 else 1.0
        if not isinstance(layer, TuckerModule):
            return slow
        staircase = 32 if x.shape[1] == 128 else 4
        return slow * float(np.ceil(layer.ranks.rank_in / staircase) * staircase)

    monkeypatch.setattr(time_table, "_seconds", seconds)
    assert suitable_multiples(timer_of(timed_net()))[0] == 32
