"""The contract of `plan` and `compress`, checked by fvcore and by comparing bits."""

import copy
import re
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batude_fx
from batude_fx.budget import Budget
from batude_fx.errors import BatudeError, BudgetError, CalibrationError, SelectionError, UnsupportedError
from batude_fx.modules import TuckerModule
from batude_fx.sites import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is not supported:FutureWarning")
EXAMPLE = torch.zeros(1, 3, 12, 12)


class Net(nn.Module):
    """Strides, groups, 1x1, depthwise, a residual, batch norm, a shared layer and one that has no bias."""

    def __init__(self, width: int = 16, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, 2 * width, 3, stride=stride, padding=1, groups=groups)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.shared = nn.Conv2d(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.mix(x))
        x = x + self.depthwise(self.shared(torch.relu(self.shared(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _net(**args: int) -> Net:
    torch.manual_seed(0)
    return Net(**args)


def _flops(model: nn.Module, example: Tensor = EXAMPLE) -> int:
    analysis = FlopCountAnalysis(copy.deepcopy(model).eval(), example)
    return int(analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total())


def _photos(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}


def _same(a: nn.Module, b: nn.Module) -> bool:
    bits_a, bits_b = a.state_dict(), b.state_dict()
    return bits_a.keys() == bits_b.keys() and all(torch.equal(value, bits_b[name]) for name, value in bits_a.items())


# The budget


@given(
    width=st.sampled_from([8, 16, 24]),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    keep=st.floats(0.35, 0.95),
    round_to=st.sampled_from([1, 4, 8]),
)
@settings(max_examples=20, deadline=None)
def test_fvcore_finds_the_budget_kept_and_the_plan_exact(
    width: int, stride: int, groups: int, keep: float, round_to: int
) -> None:
    model = _net(width=width, stride=stride, groups=groups)
    try:
        plan = batude_fx.plan(model, keep, example_inputs=EXAMPLE, calibration=None, round_to=round_to)
    except BudgetError:
        return
    small = plan.apply(model)
    assert plan.dense_flops == _flops(model)
    assert plan.flops == _flops(small) <= keep * _flops(model)
    assert plan.params == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize("calibration", [None, "synthetic", _photos()])
@pytest.mark.parametrize("limits", [{"flops": 0.6}, {"params": 0.7}, {"flops": 0.8, "params": 0.6}])
def test_every_way_to_calibrate_keeps_all_limits(calibration: Tensor | str | None, limits: dict[str, float]) -> None:
    model = _net()
    plan = batude_fx.plan(model, Budget(**limits), example_inputs=EXAMPLE, calibration=calibration)
    small = plan.apply(model)
    params, dense_params = (sum(p.numel() for p in net.parameters()) for net in (small, model))
    assert plan.flops == _flops(small) <= limits.get("flops", 1) * _flops(model)
    assert plan.params == params <= limits.get("params", 1) * dense_params


def test_equal_budgets_in_different_words_give_equal_plans() -> None:
    model = _net()
    absolute = f"{_flops(model) / 2 / 1e6}MFLOPs"
    budgets: list[float | str | Budget] = [0.5, "0.5", "2x", "50%", "50 %", absolute, Budget(flops=0.5)]
    plans = [batude_fx.plan(model, budget, example_inputs=EXAMPLE, calibration=None) for budget in budgets]
    assert all(plan.ranks == plans[0].ranks and plan.flops == plans[0].flops for plan in plans)


@pytest.mark.parametrize("limits", [{"flops": 0.01}, {"params": 0.01}])
def test_an_unreachable_budget_names_the_smallest_one_and_that_works(limits: dict[str, float]) -> None:
    model = _net()
    with pytest.raises(BudgetError, match=r"Use at least [0-9.]+\.$") as caught:
        batude_fx.compress(model, Budget(**limits), example_inputs=EXAMPLE, calibration=None)
    smallest = float(re.findall(r"at least ([0-9.]+)\.$", str(caught.value))[0])
    unit = next(iter(limits))
    assert batude_fx.plan(model, Budget(**{unit: smallest}), example_inputs=EXAMPLE, calibration=None).ranks
    with pytest.raises(BudgetError):
        batude_fx.plan(model, Budget(**{unit: smallest - 2e-4}), example_inputs=EXAMPLE, calibration=None)


@pytest.mark.parametrize("budget", ["abc", 0, 1.5, "0.5x", float("nan"), "1x", "-3", "0GFLOPs", True, ""])
def test_a_budget_that_cannot_be_meant_is_refused_in_one_line(budget: float | str) -> None:
    with pytest.raises(BudgetError, match=r"Write a fraction that remains \(0\.5\)") as caught:
        batude_fx.compress(_net(), budget, example_inputs=EXAMPLE)
    assert "\n" not in str(caught.value)


# The input model


def _hooked() -> Net:
    model = _net().train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model.depthwise.register_forward_hook(lambda *_: None)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


_ATTEMPTS: dict[str, tuple[dict[str, object], type[BatudeError] | None]] = {
    "weights only": ({"calibration": None}, None),
    "synthetic": ({}, None),
    "photos": ({"calibration": _photos()}, None),
    "bad budget": ({"budget": 2.0}, BudgetError),
    "out of reach": ({"budget": 0.001}, BudgetError),
    "bad glob": ({"include": "nothing*"}, SelectionError),
    "NaN": ({"calibration": torch.full((2, 3, 12, 12), float("nan"))}, CalibrationError),
    "shape": ({"calibration": torch.zeros(2, 1, 12, 12)}, CalibrationError),
    "size": ({"calibration": torch.zeros(2, 12, 12)}, CalibrationError),
    "empty": ({"calibration": []}, CalibrationError),
    "late NaN": ({"calibration": [_photos(), torch.full((1, 3, 12, 12), float("inf"))]}, CalibrationError),
    "no images": ({"calibration": ["photo.png"]}, CalibrationError),
    "bytes": ({"calibration": torch.zeros(2, 3, 12, 12, dtype=torch.uint8)}, CalibrationError),
    "word": ({"calibration": "imagenet"}, CalibrationError),
    "ranks": ({"ranks": {"head": Ranks(1, 1)}}, SelectionError),
    "round_to": ({"round_to": 0}, SelectionError),
}


@pytest.mark.parametrize("attempt", _ATTEMPTS)
def test_the_input_model_is_bit_identical_after_success_and_failure(attempt: str) -> None:
    options, error = _ATTEMPTS[attempt]
    options = {"budget": 0.6, "example_inputs": EXAMPLE, **options}
    model = _hooked()
    bits, modules = _bits(model), dict(model.named_modules())
    state = [(m.training, list(m._forward_hooks), list(m._backward_hooks)) for m in model.modules()]
    flags = [(p.requires_grad, p.grad is not None) for p in model.parameters()]
    random_state = torch.get_rng_state()
    if error is None:
        batude_fx.compress(model, **options)
    else:
        with pytest.raises(error) as caught:
            batude_fx.compress(model, **options)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert [(m.training, list(m._forward_hooks), list(m._backward_hooks)) for m in model.modules()] == state
    assert [(p.requires_grad, p.grad is not None) for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_input_model_survives_a_loader_that_breaks() -> None:
    def broken() -> Iterator[Tensor]:
        yield _photos()
        raise OSError("disk gone")

    model = _hooked()
    before = copy.deepcopy(model)
    with pytest.raises(OSError, match="disk gone"):
        batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=broken())
    assert _same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [len(m._forward_hooks) for m in model.modules()] == [len(m._forward_hooks) for m in before.modules()]


# The result


def test_untouched_layers_keep_their_keys_values_hooks_and_modes() -> None:
    model = _hooked()
    small = batude_fx.compress(model, 0.6, example_inputs=EXAMPLE)
    assert type(small) is Net
    replaced = {name for name, module in small.named_modules() if isinstance(module, TuckerModule)}
    assert replaced
    untouched = {k: v for k, v in model.state_dict().items() if not any(k.startswith(f"{n}.") for n in replaced)}
    assert untouched
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in untouched.items())
    assert small.training
    assert not small.norm.training
    assert len(small.depthwise._forward_hooks) == 1


def test_a_backward_pass_reaches_every_factor() -> None:
    small = batude_fx.compress(_net(), 0.5, example_inputs=EXAMPLE).train()
    small(_photos()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in small.named_parameters() if "bias" not in n)


def test_a_timm_model_keeps_its_methods() -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    small = batude_fx.compress(model, 0.5, calibration=None, example_inputs=torch.zeros(1, 3, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    assert small.forward_features(images).shape == (2, 512, 2, 2)
    assert small.feature_info == model.feature_info
    small.reset_classifier(3)
    assert small(images).shape == (2, 3)
    assert small.pretrained_cfg == model.pretrained_cfg


def test_float64_stays_float64() -> None:
    small = batude_fx.compress(_net().double(), 0.6, example_inputs=EXAMPLE.double())
    assert all(parameter.dtype == torch.float64 for parameter in small.parameters())
    assert small(EXAMPLE.double()).dtype == torch.float64


def test_two_calls_give_the_same_bits() -> None:
    first, second = (batude_fx.compress(_net(), 0.5, example_inputs=EXAMPLE) for _ in range(2))
    assert _same(first, second)


def test_calibrated_beats_weights_only_on_images_like_those() -> None:
    model = _net().eval()
    basis = torch.randn(2, 3 * 12 * 12, generator=torch.Generator().manual_seed(5))
    images = (torch.randn(80, 2, generator=torch.Generator().manual_seed(6)) @ basis).view(80, 3, 12, 12)
    wanted = model(images[40:]).detach()

    def error(calibration: Tensor | None) -> float:
        small = batude_fx.compress(model, 0.45, example_inputs=EXAMPLE, calibration=calibration).eval()
        return float((small(images[40:]).detach() - wanted).norm() / (wanted - wanted.mean(0)).norm())

    assert error(images[:40]) < 0.7 * error(None)


@pytest.mark.parametrize(
    "source",
    [
        lambda images: images,
        lambda images: list(torch.split(images, 8)),
        lambda images: iter(torch.split(images, 8)),
        lambda images: DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=8),
    ],
    ids=["tensor", "list", "iterator", "DataLoader with labels"],
)
def test_the_same_images_in_any_form_give_the_same_network(source: Callable[[Tensor], object]) -> None:
    images = _photos(16)
    reference = batude_fx.compress(_net(), 0.6, example_inputs=EXAMPLE, calibration=images)
    assert _same(reference, batude_fx.compress(_net(), 0.6, example_inputs=EXAMPLE, calibration=source(images)))


# Selection


def _replaced(**options: object) -> set[str]:
    return set(batude_fx.plan(_net(), 0.9, example_inputs=EXAMPLE, calibration=None, **options).ranks)


def test_globs_choose_the_sites() -> None:
    assert _replaced(include="mix") == {"mix"}
    assert "mix" not in _replaced(exclude=["m*"])


def test_linear_layers_are_taken_on_demand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 64), nn.Linear(64, 64))
    options = {"example_inputs": EXAMPLE, "calibration": None}
    assert set(batude_fx.plan(model, 0.5, layers="conv+linear", **options).ranks) >= {"2"}
    with pytest.raises(SelectionError, match=r"conv\+linear"):
        batude_fx.plan(model, 0.5, layers="linear", **options)


@pytest.mark.parametrize("pattern", ["nothing", "mix.*"])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str, pattern: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(repr(pattern))):
        _replaced(**{option: pattern})


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_ranks_are_multiples(round_to: int) -> None:
    plan = batude_fx.plan(_net(width=24), 0.5, example_inputs=EXAMPLE, calibration=None, round_to=round_to)
    full = {site.name: (site.group_out_channels, site.group_in_channels) for site in plan.sites}
    for name, ranks in plan.ranks.items():
        for rank, channels in zip((ranks.rank_out, ranks.rank_in), full[name], strict=True):
            assert rank % round_to == 0 or rank == channels


def test_ranks_can_be_fixed_and_sites_kept_dense() -> None:
    plan = batude_fx.plan(
        _net(), 0.9, example_inputs=EXAMPLE, calibration=None, ranks={"mix": Ranks(8, 8), "shared": None}
    )
    assert plan.ranks["mix"] == Ranks(8, 8)
    assert "shared" not in plan.ranks
    with pytest.raises(SelectionError, match="not among its options"):
        batude_fx.plan(_net(), 0.9, example_inputs=EXAMPLE, calibration=None, ranks={"mix": Ranks(9, 8)})


# The plan


@pytest.mark.parametrize("calibration", [None, "synthetic"])
def test_a_plan_at_another_budget_is_the_plan_of_that_budget(calibration: str | None) -> None:
    options = {"example_inputs": EXAMPLE, "calibration": calibration}
    plan, direct = batude_fx.plan(_net(), 0.8, **options).at("2x"), batude_fx.plan(_net(), "2x", **options)
    assert plan == direct
    assert _same(plan.apply(_net()), direct.apply(_net()))


def test_a_plan_is_frozen_and_prints_every_site_and_reason() -> None:
    plan = batude_fx.plan(_net(), 0.6, example_inputs=EXAMPLE, calibration=None)
    with pytest.raises(AttributeError):
        plan.flops = 0
    text = str(plan)
    assert all(site.name in text for site in plan.sites)
    assert "depthwise, nothing to decompose" in text


def test_a_plan_is_for_its_own_model() -> None:
    plan = batude_fx.plan(_net(), 0.6, example_inputs=EXAMPLE, calibration=None)
    with pytest.raises(SelectionError, match="has no site"):
        plan.apply(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(UnsupportedError, match="the plan was made for"):
        plan.apply(_net(width=8))


# Models that cannot be compressed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=r"compress model\.float\(\)"):
        batude_fx.compress(_net().to(dtype), 0.5, example_inputs=EXAMPLE.to(dtype))


def test_models_without_values_or_convolutions_are_refused() -> None:
    with torch.device("meta"):
        empty = _net()
    with pytest.raises(UnsupportedError, match="load the weights first"):
        batude_fx.compress(empty, 0.5, example_inputs=EXAMPLE)
    with pytest.raises(BatudeError, match="no convolution"):
        batude_fx.compress(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), 0.5, example_inputs=EXAMPLE)


def test_a_model_of_several_inputs_takes_synthetic_ones() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.a(x) + self.b(y)}

    torch.manual_seed(0)
    example = (torch.zeros(1, 3, 12, 12), torch.zeros(1, 3, 12, 12))
    plan = batude_fx.plan(Two(), 0.8, example_inputs=example, round_to=1)
    assert plan.ranks
    assert plan.apply(Two())(*example)["sum"].shape == (1, 16, 10, 10)
