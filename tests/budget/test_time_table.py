"""Times are kept on disk: a second call measures no layer, and a cache that is broken is no obstacle."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import batude_fx
from batude_fx import Budget
from tests.known_clock import INPUT, timed_net


def test_a_cache_that_cannot_be_written_is_no_obstacle(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    del clock
    monkeypatch.setenv("BATUDE_FX_CACHE", "/proc/nothing")
    assert batude_fx.plan(timed_net(), Budget(latency=0.6), example_inputs=INPUT, calibration=None).seconds


def test_a_second_call_measures_no_layer(clock: list[nn.Module], tmp_path: Path) -> None:
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None, "round_to": "auto"}
    first = batude_fx.plan(timed_net(), 0.5, **options)
    count = len(clock)
    assert count > 0
    assert batude_fx.plan(timed_net(), 0.5, **options).ranks == first.ranks
    assert len(clock) == count
    (table,) = (tmp_path / "latency").iterdir()
    for broken in ("{", json.dumps({"Conv2d": "fast"})):
        table.write_text(broken, encoding="utf-8")
        batude_fx.plan(timed_net(), 0.5, **options)
        assert len(clock) > count
        count = len(clock)
