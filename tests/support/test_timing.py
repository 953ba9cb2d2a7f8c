"""Calls are timed in turns, and the median counts."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from batude_fx.support.inputs import Inputs
from batude_fx.support.timing import time_calls, time_networks


def test_turns_alternate_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = iter(range(10_000))
    monkeypatch.setattr("batude_fx.support.timing.perf_counter", lambda: next(times))
    calls: list[Callable[[], object]] = [lambda: order.append("a"), lambda: order.append("b")]
    assert time_calls(calls, 3) == [1, 1]
    assert "".join(order) == "ab" * 5  # two of them to warm up
    training = nn.Dropout()
    assert len(time_networks([training], Inputs((torch.zeros(1),)), turns=2)) == 1
    assert training.training
