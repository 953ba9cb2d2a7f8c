"""Latency budgets, with a clock whose times are known: a formula in the ranks stands in for the machine's."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import batude_fx
from batude_fx import Budget, BudgetError, Ranks, SelectionError, UnsupportedError
from batude_fx.budget import layer_timer, time_table
from batude_fx.budget.layer_timer import LayerTimer
from batude_fx.budget.rank_options import options_by_site
from batude_fx.support.timing import time_calls, time_networks
from batude_fx.tucker.modules import TuckerModule

NANOSECONDS = 1e-9
OVERHEAD = 20_000  # nanoseconds of each layer that is called
INPUT = (torch.zeros(1, 3, 32, 32),)


def _layer_seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """One nanosecond a multiply-add, and an overhead for each part."""
    total = 0.0
    parts = layer.children() if isinstance(layer, TuckerModule) else [layer]
    for part in parts:
        if isinstance(part, nn.Conv2d):
            x = part(x)
            total += x.shape[2] * x.shape[3] * part.weight.numel() + OVERHEAD
    return NANOSECONDS * total


def _network_seconds(network: nn.Module) -> float:
    """All layers, a little slower than one by one, and three milliseconds that no site is to blame for."""
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    def listen(layer: nn.Module, args: tuple[torch.Tensor], _: object) -> None:
        seen.append((layer, args[0]))

    inside = {part for module in network.modules() if isinstance(module, TuckerModule) for part in module.children()}
    handles = [
        module.register_forward_hook(listen)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | TuckerModule) and module not in inside
    ]
    with torch.no_grad():
        network(*INPUT)
    for handle in handles:
        handle.remove()
    return 0.003 + sum(1.1 * _layer_seconds(layer, x) for layer, x in seen)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[nn.Module]:
    """Times are computed; the layers that were asked for are listed."""
    asked: list[nn.Module] = []

    def seconds(layer: nn.Module, x: torch.Tensor) -> float:
        asked.append(layer)
        return _layer_seconds(layer, x)

    monkeypatch.setenv("BATUDE_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(time_table, "_seconds", seconds)
    monkeypatch.setattr(
        LayerTimer, "_seconds", lambda _self, *networks: [_network_seconds(network) for network in networks]
    )
    return asked


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(96, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()  # fmt: skip


def _timer(model: nn.Module) -> LayerTimer:
    sites = batude_fx.discover(model, INPUT).replaceable()
    return LayerTimer(model, sites, INPUT, adds_bias=False)


def test_times_between_measured_ranks_are_those_of_the_clock(clock: list[nn.Module]) -> None:
    model = _network()
    timer = _timer(model)
    options = options_by_site(timer.sites, 8, {}, adds_bias=False)
    timed = timer.with_times(options, only_faster=False)
    for name, one in timed.items():
        layer, x = model.get_submodule(name), torch.zeros(next(iter(timer._calls[name])).shape)
        assert one.dense[2] == pytest.approx(1e9 * _layer_seconds(layer, x), rel=1e-6)
        for ranks, costs in zip(one.ranks[1:].tolist(), one.costs[1:], strict=True):
            exact = 1e9 * _layer_seconds(batude_fx.tucker.modules.build(layer, Ranks(*ranks)), x)
            assert costs[2] == pytest.approx(exact, rel=1e-6)
    assert len(clock) < sum(len(one.ranks) for one in options.values()) / 2


def test_what_is_no_faster_than_the_dense_layer_is_no_option(clock: list[nn.Module]) -> None:
    del clock
    timer = _timer(_network())
    for name, one in timer.with_times(options_by_site(timer.sites, 8, {}, adds_bias=False), only_faster=True).items():
        faster = one.costs[:, 2] < one.dense[2]
        assert (faster | (one.costs == one.dense).all(axis=1)).all(), name
    # The first layer has three input channels: two more layers cost more time than they save.
    assert "0" not in batude_fx.plan(_network(), 0.5, example_inputs=INPUT, calibration=None, round_to="auto").ranks


@pytest.mark.parametrize("limit", ["1.8x", 0.4, "18ms"])
def test_the_network_meets_the_limit_though_its_sites_do_not_explain_all_its_time(
    clock: list[nn.Module], limit: float | str
) -> None:
    del clock
    model = _network()
    dense = _network_seconds(model)
    allowed = {"1.8x": dense / 1.8, 0.4: 0.4 * dense, "18ms": 0.018}[limit]
    plan = batude_fx.plan(model, Budget(latency=limit), example_inputs=INPUT, calibration=None)
    taken = _network_seconds(plan.apply(model))
    assert 0.9 * allowed <= taken <= allowed
    assert plan.seconds == pytest.approx(taken, rel=1e-6)
    assert plan.dense_seconds == pytest.approx(dense, rel=1e-6)
    assert "ms a run" in str(plan)


@pytest.mark.parametrize("faster", [1.1, 1.3, 1.8])
@pytest.mark.parametrize("busy", [0.4, 2.0, 3.5])
def test_layers_that_were_timed_on_a_busier_or_idler_day_are_no_obstacle(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch, busy: float, faster: float
) -> None:
    del clock
    monkeypatch.setattr(
        LayerTimer, "_seconds", lambda _self, *networks: [busy * _network_seconds(network) for network in networks]
    )
    model = _network()
    plan = batude_fx.plan(model, Budget(latency=f"{faster}x"), example_inputs=INPUT, calibration=None)
    share = faster * _network_seconds(plan.apply(model)) / _network_seconds(model)
    assert 0.9 < share <= 1


def test_a_latency_and_flops_hold_together(clock: list[nn.Module]) -> None:
    del clock
    model = _network()
    plan = batude_fx.plan(model, Budget(flops=0.5, latency=0.6), example_inputs=INPUT, calibration=None)
    assert plan.flops <= 0.5 * plan.dense_flops
    assert _network_seconds(plan.apply(model)) <= 0.6 * _network_seconds(model)
    tighter = plan.at(Budget(latency=0.45))
    assert tighter.seconds is not None
    assert tighter.seconds == pytest.approx(_network_seconds(tighter.apply(model)), rel=0.1)


def test_out_of_reach_is_said_with_both_times_and_what_can_be_reached(clock: list[nn.Module]) -> None:
    del clock
    with pytest.raises(BudgetError, match=r"latency is out of reach.*still need .* of .* ms\. Use at least") as error:
        batude_fx.plan(_network(), Budget(latency=0.01), example_inputs=INPUT, calibration=None)
    least = float(str(error.value).rpartition("at least ")[2].rstrip("."))
    plan = batude_fx.plan(_network(), Budget(latency=least), example_inputs=INPUT, calibration=None)
    assert _network_seconds(plan.apply(_network())) <= least * _network_seconds(_network())
    with pytest.raises(BudgetError):
        batude_fx.plan(_network(), Budget(latency=least - 0.01), example_inputs=INPUT, calibration=None)


def test_a_limit_that_the_network_misses_is_no_plan(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is slower than all that its sites take: only timing the whole of it shows that."""
    del clock

    def seconds(_: LayerTimer, *networks: nn.Module) -> list[float]:
        tucker = [any(isinstance(one, TuckerModule) for one in network.modules()) for network in networks]
        return [_network_seconds(network) + 0.02 * slow for network, slow in zip(networks, tucker, strict=True)]

    monkeypatch.setattr(LayerTimer, "_seconds", seconds)
    with pytest.raises(BudgetError, match=r"out of reach.*ms"):
        batude_fx.plan(_network(), Budget(latency=0.3), example_inputs=INPUT, calibration=None)


def test_a_clock_that_jumps_is_warned_of(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    del clock
    jumps = iter([0.75, 0.5, 0.7, 0.53, 0.67, 0.55, 0.64] * 3)

    def seconds(_: LayerTimer, dense: nn.Module, *small: nn.Module) -> list[float]:
        return [_network_seconds(dense), *(next(jumps) * _network_seconds(dense) for _ in small)]

    monkeypatch.setattr(LayerTimer, "_seconds", seconds)
    with pytest.warns(UserWarning, match="the machine may be busy"):
        batude_fx.plan(_network(), Budget(latency=0.6), example_inputs=INPUT, calibration=None)


@pytest.mark.parametrize("latency", [0.179, 0.182, 0.185, 0.191, 0.194, 0.36, 0.66, 0.96])
@pytest.mark.filterwarnings("ignore:.*no ranks lie between")
def test_what_layers_cost_in_the_network_alone_is_found_without_a_circle(
    latency: float, clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    timed: list[float] = []

    def seconds(_: LayerTimer, *networks: nn.Module) -> list[float]:
        layers = [sum(isinstance(part, TuckerModule) for part in one.modules()) for one in networks]
        found = [_network_seconds(one) + 1e-3 * count for one, count in zip(networks, layers, strict=True)]
        timed.append(found[-1])
        return found

    monkeypatch.setattr(LayerTimer, "_seconds", seconds)
    plan = batude_fx.plan(_network(), Budget(latency=latency), example_inputs=INPUT, calibration=None)
    assert 0.9 * latency * timed[0] <= plan.seconds <= 1.001 * latency * timed[0]
    assert len(timed) == len(set(timed))  # none is timed twice


def test_one_disturbed_timing_is_no_refusal(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    del clock
    jumps = iter([4.0])

    def seconds(_: LayerTimer, dense: nn.Module, *small: nn.Module) -> list[float]:
        return [_network_seconds(dense), *(next(jumps, 1.0) * _network_seconds(one) for one in small)]

    monkeypatch.setattr(LayerTimer, "_seconds", seconds)
    plan = batude_fx.plan(_network(), Budget(latency=0.6), example_inputs=INPUT, calibration=None)
    assert 0.9 * 0.6 < _network_seconds(plan.apply(_network())) / _network_seconds(_network()) <= 0.6


def test_a_latency_that_does_not_bind_changes_nothing(clock: list[nn.Module]) -> None:
    del clock
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None}
    alone = batude_fx.plan(_network(), 0.5, **options)
    assert batude_fx.plan(_network(), Budget(flops=0.5, latency="10s"), **options).ranks == alone.ranks


def test_where_sizes_vary_times_cannot_be_foreseen() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            return y[x[:, 0, 0, 0] > 0]

    with pytest.raises(UnsupportedError, match="cannot be foreseen"):
        batude_fx.plan(Chooses(), Budget(latency=0.5), example_inputs=torch.ones(1, 8, 9, 9), calibration=None)


def test_a_cache_that_cannot_be_written_is_no_obstacle(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    del clock
    monkeypatch.setenv("BATUDE_FX_CACHE", "/proc/nothing")
    assert batude_fx.plan(_network(), Budget(latency=0.6), example_inputs=INPUT, calibration=None).seconds


def test_a_plan_without_times_has_none_for_another_budget() -> None:
    plan = batude_fx.plan(_network(), 0.5, example_inputs=INPUT, calibration=None)
    assert plan.seconds is None
    with pytest.raises(BudgetError, match="no times have been measured"):
        plan.at(Budget(latency=0.5))


def test_a_second_call_measures_no_layer(clock: list[nn.Module], tmp_path: Path) -> None:
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None, "round_to": "auto"}
    first = batude_fx.plan(_network(), 0.5, **options)
    count = len(clock)
    assert count > 0
    assert batude_fx.plan(_network(), 0.5, **options).ranks == first.ranks
    assert len(clock) == count
    (table,) = (tmp_path / "latency").iterdir()
    for broken in ("{", json.dumps({"Conv2d": "fast"})):
        table.write_text(broken, encoding="utf-8")
        batude_fx.plan(_network(), 0.5, **options)
        assert len(clock) > count
        count = len(clock)


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
    assert list(_timer(_network()).multiples()) == [one for one in (32, 16, 8, 4) if one <= staircase]


def test_auto_takes_finer_multiples_where_coarse_ones_are_too_large_for_the_budget(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    monkeypatch.setattr(time_table, "_seconds", lambda layer, _: 1 - 0.5 * isinstance(layer, TuckerModule))
    monkeypatch.setattr(LayerTimer, "multiples", lambda _: [32, 16, 8, 4])
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None}
    smallest = {step: _smallest(_network(), round_to=step, **options) for step in (4, 8, 16, 32)}
    assert sorted(smallest.values()) == list(smallest.values())
    for step in (8, 16, 32):
        plan = batude_fx.plan(_network(), smallest[step // 2], round_to="auto", **options)
        assert plan.round_to == step // 2
    with pytest.raises(BudgetError, match="multiples of 4"):
        batude_fx.plan(_network(), smallest[4] / 2, round_to="auto", **options)


def test_auto_replaces_slower_sites_where_the_budget_asks_for_it(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    monkeypatch.setattr(time_table, "_seconds", lambda layer, _: 1 + isinstance(layer, TuckerModule))
    plan = batude_fx.plan(_network(), 0.5, example_inputs=INPUT, calibration=None, round_to="auto")
    assert plan.flops <= 0.5 * plan.dense_flops


def test_auto_takes_finer_multiples_before_slower_sites(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock

    def seconds(layer: nn.Module, _: torch.Tensor) -> float:
        """Only ranks of 16 and less are faster than dense layers."""
        if not isinstance(layer, TuckerModule):
            return 1.5
        return 2.0 if max(layer.ranks.rank_in, layer.ranks.rank_out) > 16 else 1.0

    monkeypatch.setattr(time_table, "_seconds", seconds)
    monkeypatch.setattr(LayerTimer, "multiples", lambda _: [32, 16])
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None, "include": "6"}
    plan = batude_fx.plan(_network(), 0.7, round_to="auto", **options)
    assert plan.round_to == 16
    assert plan.ranks["6"].rank_in <= 16


def test_auto_finds_ranks_that_the_user_fixed(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    del clock
    monkeypatch.setattr(LayerTimer, "multiples", lambda _: [32, 16, 8, 4])
    fixed = Ranks(24, 40)
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None, "round_to": "auto"}
    plan = batude_fx.plan(_network(), 0.9, ranks={"6": fixed}, **options)
    assert (plan.ranks["6"], plan.round_to) == (fixed, 8)
    with pytest.raises(SelectionError, match="multiples of 4"):
        batude_fx.plan(_network(), 0.9, ranks={"6": Ranks(23, 40)}, **options)


def test_the_layers_that_take_longest_decide_the_multiple(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    monkeypatch.setattr(layer_timer, "_PROBED", 1)

    def seconds(layer: nn.Module, x: torch.Tensor) -> float:
        slow = 3.0 if x.shape[1] == 128 else 1.0
        if not isinstance(layer, TuckerModule):
            return slow
        staircase = 32 if x.shape[1] == 128 else 4
        return slow * float(np.ceil(layer.ranks.rank_in / staircase) * staircase)

    monkeypatch.setattr(time_table, "_seconds", seconds)
    assert _timer(_network()).multiples()[0] == 32


def _smallest(model: nn.Module, **options: Any) -> float:
    """The smallest budget that the refusal of an impossible one names."""
    with pytest.raises(BudgetError) as caught:
        batude_fx.plan(model, 1e-6, **options)
    return float(re.findall(r"at least ([\d.]+\d)", str(caught.value))[0])


def test_the_model_and_the_random_state_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATUDE_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(time_table, "_SECONDS", 0)
    monkeypatch.setattr(layer_timer, "_MODEL_SECONDS", 0)
    model = _network().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, flags = torch.get_rng_state(), [module.training for module in model.modules()]
    batude_fx.compress(model, Budget(flops=0.5, latency="1s"), example_inputs=INPUT, calibration=None)
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("multiple", [0, -8, 8.5, "8", None])
def test_a_multiple_below_one_is_refused(multiple: Any) -> None:
    with pytest.raises(SelectionError, match='8 by default, or "auto"'):
        batude_fx.plan(_network(), 0.5, example_inputs=INPUT, round_to=multiple)


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


def test_turns_alternate_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = iter(range(10_000))
    monkeypatch.setattr("batude_fx.support.timing.perf_counter", lambda: next(times))
    calls: list[Callable[[], object]] = [lambda: order.append("a"), lambda: order.append("b")]
    assert time_calls(calls, 3) == [1, 1]
    assert "".join(order) == "ab" * 5  # two of them to warm up
    training = nn.Dropout()
    assert len(time_networks([training], (torch.zeros(1),), turns=2)) == 1
    assert training.training
