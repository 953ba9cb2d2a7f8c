"""Layers are timed at few ranks, and the times between these are the clock's."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import batude_fx
from batude_fx import Budget, Ranks, UnsupportedError
from batude_fx.budget import layer_timer, time_table
from batude_fx.budget.rank_options import options_by_site
from tests.known_clock import INPUT, layer_seconds, timed_net, timer_of


def test_times_between_measured_ranks_are_those_of_the_clock(clock: list[nn.Module]) -> None:
    model = timed_net()
    timer = timer_of(model)
    options = options_by_site(timer.sites, 8, {}, adds_bias=False)
    timed = timer.with_times(options, only_faster=False)
    for name, site_options in timed.items():
        layer, x = model.get_submodule(name), torch.zeros(next(iter(timer.calls[name])).shape)
        assert site_options.dense[2] == pytest.approx(1e9 * layer_seconds(layer, x), rel=1e-6)
        for ranks, costs in zip(site_options.ranks[1:].tolist(), site_options.costs[1:], strict=True):
            exact = 1e9 * layer_seconds(batude_fx.tucker.modules.build(layer, Ranks(*ranks)), x)
            assert costs[2] == pytest.approx(exact, rel=1e-6)
    assert len(clock) < sum(len(site_options.ranks) for site_options in options.values()) / 2


def test_ranks_that_are_not_faster_than_the_dense_layer_are_left_out(clock: list[nn.Module]) -> None:
    del clock
    timer = timer_of(timed_net())
    timed = timer.with_times(options_by_site(timer.sites, 8, {}, adds_bias=False), only_faster=True)
    for name, site_options in timed.items():
        faster = site_options.costs[:, 2] < site_options.dense[2]
        assert (faster | (site_options.costs == site_options.dense).all(axis=1)).all(), name
    # The first layer has three input channels: two more layers cost more time than they save.
    assert "0" not in batude_fx.plan(timed_net(), 0.5, example_inputs=INPUT, calibration=None, round_to="auto").ranks


def test_a_latency_is_refused_where_sizes_depend_on_values() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            return y[x[:, 0, 0, 0] > 0]

    with pytest.raises(UnsupportedError, match="cannot be foreseen"):
        batude_fx.plan(Chooses(), Budget(latency=0.5), example_inputs=torch.ones(1, 8, 9, 9), calibration=None)


def test_the_model_and_the_random_state_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATUDE_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(time_table, "_SECONDS", 0)
    monkeypatch.setattr(layer_timer, "_MODEL_SECONDS", 0)
    model = timed_net().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, flags = torch.get_rng_state(), [module.training for module in model.modules()]
    batude_fx.compress(model, Budget(flops=0.5, latency="1s"), example_inputs=INPUT, calibration=None)
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_real_clock_gives_real_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATUDE_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(time_table, "_SECONDS", 0)
    monkeypatch.setattr(layer_timer, "_MODEL_SECONDS", 0)
    model = timm.create_model("test_resnet", num_classes=3).to(memory_format=torch.channels_last)
    plan = batude_fx.plan(model, 0.6, calibration=None, round_to="auto")
    assert plan.dense_seconds is not None
    assert plan.seconds is not None
    assert 0 < plan.seconds < 10
    known: Mapping[str, int] = json.loads(next((tmp_path / "latency").iterdir()).read_text(encoding="utf-8"))
    assert any("channels last" in key for key in known)
