"""Plans meet a limit on time, and take the multiple of ranks that is fast and fine enough."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import batude_fx
from batude_fx import Budget, BudgetError, Ranks, SelectionError
from batude_fx.budget import time_table
from batude_fx.budget.layer_timer import LayerTimer
from batude_fx.compression import latency_search
from batude_fx.tucker.modules import TuckerModule
from tests.known_clock import INPUT, network_seconds, timed_net


@pytest.mark.parametrize("limit", ["1.8x", 0.4, "18ms"])
def test_the_network_meets_the_limit_though_its_sites_do_not_explain_all_its_time(
    clock: list[nn.Module], limit: float | str
) -> None:
    del clock
    model = timed_net()
    dense = network_seconds(model)
    allowed = {"1.8x": dense / 1.8, 0.4: 0.4 * dense, "18ms": 0.018}[limit]
    plan = batude_fx.plan(model, Budget(latency=limit), example_inputs=INPUT, calibration=None)
    taken = network_seconds(plan.apply(model))
    assert 0.9 * allowed <= taken <= allowed
    assert plan.seconds == pytest.approx(taken, rel=1e-6)
    assert plan.dense_seconds == pytest.approx(dense, rel=1e-6)
    assert "ms a run" in str(plan)


@pytest.mark.parametrize("faster", [1.1, 1.3, 1.8])
@pytest.mark.parametrize("busy", [0.4, 2.0, 3.5])
def test_times_of_layers_from_a_busier_or_idler_machine_do_no_harm(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch, busy: float, faster: float
) -> None:
    del clock
    monkeypatch.setattr(
        LayerTimer, "_seconds", lambda _self, *networks: [busy * network_seconds(network) for network in networks]
    )
    model = timed_net()
    plan = batude_fx.plan(model, Budget(latency=f"{faster}x"), example_inputs=INPUT, calibration=None)
    share = faster * network_seconds(plan.apply(model)) / network_seconds(model)
    assert 0.9 < share <= 1


def test_a_latency_and_flops_hold_together(clock: list[nn.Module]) -> None:
    del clock
    model = timed_net()
    plan = batude_fx.plan(model, Budget(flops=0.5, latency=0.6), example_inputs=INPUT, calibration=None)
    assert plan.flops <= 0.5 * plan.dense_flops
    assert network_seconds(plan.apply(model)) <= 0.6 * network_seconds(model)
    tighter = plan.at(Budget(latency=0.45))
    assert tighter.seconds is not None
    assert tighter.seconds == pytest.approx(network_seconds(tighter.apply(model)), rel=0.1)


def test_a_latency_out_of_reach_names_both_times_and_the_smallest_that_works(clock: list[nn.Module]) -> None:
    del clock
    with pytest.raises(BudgetError, match=r"latency is out of reach.*still need .* of .* ms\. Use at least") as error:
        batude_fx.plan(timed_net(), Budget(latency=0.01), example_inputs=INPUT, calibration=None)
    least = float(str(error.value).rpartition("at least ")[2].rstrip("."))
    plan = batude_fx.plan(timed_net(), Budget(latency=least), example_inputs=INPUT, calibration=None)
    assert network_seconds(plan.apply(timed_net())) <= least * network_seconds(timed_net())
    with pytest.raises(BudgetError):
        batude_fx.plan(timed_net(), Budget(latency=least - 0.01), example_inputs=INPUT, calibration=None)


def test_a_limit_that_the_whole_network_misses_is_refused(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is slower than all that its sites take: only timing the whole of it shows that."""
    del clock

    def seconds(_: LayerTimer, *networks: nn.Module) -> list[float]:
        tucker = [any(isinstance(module, TuckerModule) for module in network.modules()) for network in networks]
        return [network_seconds(network) + 0.02 * slow for network, slow in zip(networks, tucker, strict=True)]

    monkeypatch.setattr(LayerTimer, "_seconds", seconds)
    with pytest.raises(BudgetError, match=r"out of reach.*ms"):
        batude_fx.plan(timed_net(), Budget(latency=0.3), example_inputs=INPUT, calibration=None)


def test_a_clock_that_jumps_gives_a_warning(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    del clock
    jumps = iter([0.75, 0.5, 0.7, 0.53, 0.67, 0.55, 0.64] * 3)

    def seconds(_: LayerTimer, dense: nn.Module, *small: nn.Module) -> list[float]:
        return [network_seconds(dense), *(next(jumps) * network_seconds(dense) for _ in small)]

    monkeypatch.setattr(LayerTimer, "_seconds", seconds)
    with pytest.warns(UserWarning, match="the machine may be busy"):
        batude_fx.plan(timed_net(), Budget(latency=0.6), example_inputs=INPUT, calibration=None)


@pytest.mark.parametrize("latency", [0.179, 0.182, 0.185, 0.191, 0.194, 0.36, 0.66, 0.96])
@pytest.mark.filterwarnings("ignore:.*no ranks give a time nearer")
def test_the_search_accounts_for_time_that_layers_cost_in_the_network_only(
    latency: float, clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    timed: list[float] = []

    def seconds(_: LayerTimer, *networks: nn.Module) -> list[float]:
        layers = [sum(isinstance(part, TuckerModule) for part in network.modules()) for network in networks]
        found = [network_seconds(network) + 1e-3 * count for network, count in zip(networks, layers, strict=True)]
        timed.append(found[-1])
        return found

    monkeypatch.setattr(LayerTimer, "_seconds", seconds)
    plan = batude_fx.plan(timed_net(), Budget(latency=latency), example_inputs=INPUT, calibration=None)
    assert 0.9 * latency * timed[0] <= plan.seconds <= 1.001 * latency * timed[0]
    assert len(timed) == len(set(timed))  # none is timed twice


def test_one_disturbed_timing_does_not_refuse_a_budget(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    del clock
    jumps = iter([4.0])

    def seconds(_: LayerTimer, dense: nn.Module, *small: nn.Module) -> list[float]:
        return [network_seconds(dense), *(next(jumps, 1.0) * network_seconds(network) for network in small)]

    monkeypatch.setattr(LayerTimer, "_seconds", seconds)
    plan = batude_fx.plan(timed_net(), Budget(latency=0.6), example_inputs=INPUT, calibration=None)
    assert 0.9 * 0.6 < network_seconds(plan.apply(timed_net())) / network_seconds(timed_net()) <= 0.6


def test_a_latency_that_does_not_bind_changes_nothing(clock: list[nn.Module]) -> None:
    del clock
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None}
    alone = batude_fx.plan(timed_net(), 0.5, **options)
    assert batude_fx.plan(timed_net(), Budget(flops=0.5, latency="10s"), **options).ranks == alone.ranks


def test_a_plan_without_times_refuses_a_latency_as_another_budget() -> None:
    plan = batude_fx.plan(timed_net(), 0.5, example_inputs=INPUT, calibration=None)
    assert plan.seconds is None
    with pytest.raises(BudgetError, match="no times have been measured"):
        plan.at(Budget(latency=0.5))


def test_auto_takes_finer_multiples_where_coarse_ones_are_too_large_for_the_budget(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    monkeypatch.setattr(time_table, "_seconds", lambda layer, _: 1 - 0.5 * isinstance(layer, TuckerModule))
    monkeypatch.setattr(latency_search, "suitable_multiples", lambda _: [32, 16, 8, 4])
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None}
    smallest = {step: _smallest(timed_net(), round_to=step, **options) for step in (4, 8, 16, 32)}
    assert sorted(smallest.values()) == list(smallest.values())
    for step in (8, 16, 32):
        plan = batude_fx.plan(timed_net(), smallest[step // 2], round_to="auto", **options)
        assert plan.round_to == step // 2
    with pytest.raises(BudgetError, match="multiples of 4"):
        batude_fx.plan(timed_net(), smallest[4] / 2, round_to="auto", **options)


def test_auto_replaces_slower_sites_where_the_budget_asks_for_it(
    clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    del clock
    monkeypatch.setattr(time_table, "_seconds", lambda layer, _: 1 + isinstance(layer, TuckerModule))
    plan = batude_fx.plan(timed_net(), 0.5, example_inputs=INPUT, calibration=None, round_to="auto")
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
    monkeypatch.setattr(latency_search, "suitable_multiples", lambda _: [32, 16])
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None, "include": "6"}
    plan = batude_fx.plan(timed_net(), 0.7, round_to="auto", **options)
    assert plan.round_to == 16
    assert plan.ranks["6"].rank_in <= 16


def test_auto_finds_ranks_that_the_user_fixed(clock: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    del clock
    monkeypatch.setattr(latency_search, "suitable_multiples", lambda _: [32, 16, 8, 4])
    fixed = Ranks(24, 40)
    options: dict[str, Any] = {"example_inputs": INPUT, "calibration": None, "round_to": "auto"}
    plan = batude_fx.plan(timed_net(), 0.9, ranks={"6": fixed}, **options)
    assert (plan.ranks["6"], plan.round_to) == (fixed, 8)
    with pytest.raises(SelectionError, match="multiples of 4"):
        batude_fx.plan(timed_net(), 0.9, ranks={"6": Ranks(23, 40)}, **options)


def _smallest(model: nn.Module, **options: Any) -> float:
    """The smallest budget that the refusal of an impossible one names."""
    with pytest.raises(BudgetError) as caught:
        batude_fx.plan(model, 1e-6, **options)
    return float(re.findall(r"at least ([\d.]+\d)", str(caught.value))[0])


@pytest.mark.parametrize("multiple", [0, -8, 8.5, "8", None])
def test_a_multiple_below_one_is_refused(multiple: Any) -> None:
    with pytest.raises(SelectionError, match='8 by default, or "auto"'):
        batude_fx.plan(timed_net(), 0.5, example_inputs=INPUT, round_to=multiple)
