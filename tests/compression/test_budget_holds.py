"""The budget of every plan holds by the count of fvcore, and the numbers of the plan are exact."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

import batude_fx
from batude_fx.budget.budget import Budget
from batude_fx.errors import BudgetError
from tests.compression.common import EXAMPLE, fvcore_flops, parameter_count, photos, same_bits, smallest_reachable
from tests.toy_networks import choosy_net, networks, varied_net

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is not supported:FutureWarning")


@given(networks(), st.floats(0.05, 0.95), st.sampled_from([1, 4, 8]), st.sampled_from([None, None, photos()]))
@settings(max_examples=40, deadline=None)
def test_fvcore_finds_the_budget_kept_and_the_plan_exact(
    model: nn.Module, keep: float, round_to: int, calibration: Tensor | None
) -> None:
    options = {"example_inputs": EXAMPLE, "calibration": calibration, "round_to": round_to}
    try:
        plan = batude_fx.plan(model, keep, **options)
    except BudgetError as error:
        keep = smallest_reachable(error) + 1e-4
        plan = batude_fx.plan(model, keep, **options)
    small = plan.apply(model)
    assert plan.dense_flops == fvcore_flops(model)
    assert plan.flops == fvcore_flops(small) <= keep * fvcore_flops(model)
    assert plan.params == parameter_count(small)


@pytest.mark.parametrize("calibration", [None, "synthetic", torch.randn(8, 3, 64, 64)])
@pytest.mark.parametrize(("name", "keep"), [("resnet10t", 0.4), ("mobilenetv3_small_050", 0.8), ("regnetx_002", 0.6)])
def test_fvcore_finds_the_budget_of_timm_models_kept(name: str, keep: float, calibration: Tensor | str | None) -> None:
    model, example = timm.create_model(name), torch.zeros(1, 3, 64, 64)
    plan = batude_fx.plan(model, keep, example_inputs=example, calibration=calibration)
    small = plan.apply(model)
    assert plan.dense_flops == fvcore_flops(model, example)
    assert plan.flops == fvcore_flops(small, example) <= keep * plan.dense_flops
    assert plan.params == parameter_count(small)


@pytest.mark.parametrize("calibration", [None, "synthetic", photos()])
@pytest.mark.parametrize("limits", [{"flops": 0.6}, {"params": 0.7}, {"flops": 0.8, "params": 0.6}])
def test_every_way_to_calibrate_keeps_all_limits(calibration: Tensor | str | None, limits: dict[str, float]) -> None:
    model = varied_net()
    plan = batude_fx.plan(model, Budget(**limits), example_inputs=EXAMPLE, calibration=calibration)
    small = plan.apply(model)
    assert plan.flops == fvcore_flops(small) <= limits.get("flops", 1) * fvcore_flops(model)
    assert plan.params == parameter_count(small) <= limits.get("params", 1) * parameter_count(model)


@pytest.mark.parametrize("layer", [StdConv2d, ScaledStdConv2d])
def test_layers_with_weight_standardization_are_counted_exactly(layer: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(3, 32, 3, padding=1), layer(32, 32, 3, padding=1), layer(32, 16, 1))
    plan = batude_fx.plan(model, Budget(flops=0.7, params=0.8), example_inputs=EXAMPLE, calibration=None)
    small = plan.apply(model)
    assert plan.flops == fvcore_flops(small)
    assert plan.params == sum(parameter.numel() for parameter in small.parameters())


def test_equal_budgets_in_different_words_give_equal_plans() -> None:
    model = varied_net()
    absolute = f"{fvcore_flops(model) / 2 / 1e6}MFLOPs"
    budgets: list[float | str | Budget] = [0.5, "0.5", "2x", "50%", "50 %", absolute, Budget(flops=0.5)]
    plans = [batude_fx.plan(model, budget, example_inputs=EXAMPLE, calibration=None) for budget in budgets]
    assert all(plan.ranks == plans[0].ranks and plan.flops == plans[0].flops for plan in plans)


def test_a_copy_that_chooses_more_boxes_gets_smaller_ranks_until_it_meets_the_budget() -> None:
    model, x = choosy_net(head=64)
    plan = batude_fx.plan(model, 0.5, calibration=None, example_inputs=x)
    limit = 0.5 * fvcore_flops(model, x)
    assert fvcore_flops(plan._build(model), x) > limit
    assert fvcore_flops(plan.apply(model), x) <= limit


def test_a_plan_that_was_measured_gives_the_network_that_compress_gives() -> None:
    model, x = choosy_net(head=64)
    plan = batude_fx.plan(model, 0.5, example_inputs=x)
    assert str(plan.budget) == "flops 0.5"
    small = batude_fx.compress(model, 0.5, example_inputs=x)
    assert same_bits(plan.apply(model), small)


def test_a_site_of_a_detector_is_cut_alone_too() -> None:
    model, x = choosy_net(head=64)
    plan = batude_fx.plan(model, 0.5, example_inputs=x, round_to=1)
    loose = batude_fx.plan(model, 0.9, example_inputs=x, round_to=1)
    first, second = (each.sensitivity(model).sites for each in (plan, loose))
    assert first == second


def test_too_many_boxes_for_any_ranks_are_an_error() -> None:
    model, x = choosy_net(head=4096)
    with pytest.raises(BudgetError, match=r"fvcore counts [0-9,]+ flops .* more boxes than the dense one"):
        batude_fx.compress(model, 0.9, calibration=None, example_inputs=x)


def test_branches_that_a_fresh_network_multiplies_by_zero_are_not_cut_to_nothing() -> None:
    """timm's fresh ResNets end every branch in a batch-norm of zero gain: no error in it reaches the outputs yet."""
    model = timm.create_model("resnet18").eval()
    assert not model.layer1[0].bn2.weight.any()
    plan = batude_fx.plan(model, 0.5, example_inputs=torch.zeros(1, 3, 32, 32))
    assert 0.99 * 0.5 < plan.flops / plan.dense_flops <= 0.5


def test_attention_is_counted_the_same_without_gradients() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3)
            self.more = nn.Conv2d(32, 32, 3)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.more(self.conv(x)).flatten(2).mT  # (N, positions, 32)
            out: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return out

    model = Attention().eval()
    with torch.no_grad():
        small = batude_fx.compress(model, 0.8, calibration=None, example_inputs=EXAMPLE)
    assert fvcore_flops(small) <= 0.8 * fvcore_flops(model)
    assert torch.backends.mha.get_fastpath_enabled()
