"""The contract of `plan` and `compress`, checked by fvcore and by comparing bits."""

import copy
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batude_fx
from batude_fx.budget.budget import Budget
from batude_fx.errors import BatudeError, BudgetError, CalibrationError, SelectionError, UnsupportedError
from batude_fx.tucker.modules import TuckerModule
from batude_fx.tucker.ranks import Ranks

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


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().numpy().tobytes()


def _fingerprint(model: nn.Module) -> list[object]:
    """Everything of a model that must not change, and the states of the random generators."""
    modules = list(model.named_modules(remove_duplicate=False))
    return [
        [(name, id(module), module.training) for name, module in modules],
        [(list(module._forward_hooks.values()), list(module._backward_hooks.values())) for _, module in modules],
        [(name, id(tensor), _bytes(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()],
        [(name, p.requires_grad, _bytes(p.grad)) for name, p in model.named_parameters()],
        [_bytes(torch.get_rng_state()), random.getstate()],
    ]


def _smallest_reachable(error: BudgetError) -> float:
    return float(re.findall(r"Use at least ([0-9.]+)\.$", str(error))[0])


def _same(a: nn.Module, b: nn.Module) -> bool:
    bits_a, bits_b = a.state_dict(), b.state_dict()
    return bits_a.keys() == bits_b.keys() and all(torch.equal(value, bits_b[name]) for name, value in bits_a.items())


# The budget


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return out


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A stem that can be compressed, then convolutions of all kinds, with and without bias, norms and residuals."""
    torch.manual_seed(0)
    channels, bias = 16, st.booleans()
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=draw(bias))]
    for kind in draw(st.lists(st.sampled_from(["full", "pointwise", "depthwise", "residual"]), max_size=3)):
        width, stride = channels, draw(st.integers(1, 2))
        if kind == "depthwise":
            layer: nn.Module = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=draw(bias))
        elif kind == "residual":
            layer = Residual(nn.Conv2d(channels, channels, 3, padding=1, bias=draw(bias)), nn.ReLU())
        else:
            width, extent = draw(st.sampled_from([8, 24, 40])), 1 if kind == "pointwise" else draw(st.integers(2, 3))
            groups, padding = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
            layer = nn.Conv2d(channels, width, extent, stride, padding, groups=groups, bias=draw(bias))
        layers += [layer, nn.BatchNorm2d(width)] if draw(bias) else [layer, nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@given(networks(), st.floats(0.05, 0.95), st.sampled_from([1, 4, 8]), st.sampled_from([None, None, _photos()]))
@settings(max_examples=40, deadline=None)
def test_fvcore_finds_the_budget_kept_and_the_plan_exact(
    model: nn.Module, keep: float, round_to: int, calibration: Tensor | None
) -> None:
    options = {"example_inputs": EXAMPLE, "calibration": calibration, "round_to": round_to}
    try:
        plan = batude_fx.plan(model, keep, **options)
    except BudgetError as error:
        keep = _smallest_reachable(error) + 1e-4
        plan = batude_fx.plan(model, keep, **options)
    small = plan.apply(model)
    assert plan.dense_flops == _flops(model)
    assert plan.flops == _flops(small) <= keep * _flops(model)
    assert plan.params == _count(small)


@pytest.mark.parametrize("calibration", [None, "synthetic", torch.randn(8, 3, 64, 64)])
@pytest.mark.parametrize(("name", "keep"), [("resnet10t", 0.4), ("mobilenetv3_small_050", 0.8), ("regnetx_002", 0.6)])
def test_fvcore_finds_the_budget_of_timm_models_kept(name: str, keep: float, calibration: Tensor | str | None) -> None:
    model, example = timm.create_model(name), torch.zeros(1, 3, 64, 64)
    plan = batude_fx.plan(model, keep, example_inputs=example, calibration=calibration)
    small = plan.apply(model)
    assert plan.dense_flops == _flops(model, example)
    assert plan.flops == _flops(small, example) <= keep * plan.dense_flops
    assert plan.params == _count(small)


@pytest.mark.parametrize("calibration", [None, "synthetic", _photos()])
@pytest.mark.parametrize("limits", [{"flops": 0.6}, {"params": 0.7}, {"flops": 0.8, "params": 0.6}])
def test_every_way_to_calibrate_keeps_all_limits(calibration: Tensor | str | None, limits: dict[str, float]) -> None:
    model = _net()
    plan = batude_fx.plan(model, Budget(**limits), example_inputs=EXAMPLE, calibration=calibration)
    small = plan.apply(model)
    assert plan.flops == _flops(small) <= limits.get("flops", 1) * _flops(model)
    assert plan.params == _count(small) <= limits.get("params", 1) * _count(model)


@pytest.mark.parametrize("layer", [StdConv2d, ScaledStdConv2d])
def test_weight_standardization_is_counted_where_it_goes(layer: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(3, 32, 3, padding=1), layer(32, 32, 3, padding=1), layer(32, 16, 1))
    plan = batude_fx.plan(model, Budget(flops=0.7, params=0.8), example_inputs=EXAMPLE, calibration=None)
    small = plan.apply(model)
    assert plan.flops == _flops(small)
    assert plan.params == sum(parameter.numel() for parameter in small.parameters())


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
    smallest = _smallest_reachable(caught.value)
    unit = next(iter(limits))
    assert batude_fx.plan(model, Budget(**{unit: smallest}), example_inputs=EXAMPLE, calibration=None).ranks
    with pytest.raises(BudgetError):
        batude_fx.plan(model, Budget(**{unit: smallest - 2e-4}), example_inputs=EXAMPLE, calibration=None)


def test_sites_that_cannot_shrink_are_told_the_way_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))  # no multiple of 8 is below 8
    with pytest.raises(BudgetError, match=r"still need .* Use a smaller round_to, or more sites"):
        batude_fx.compress(model, 0.5, example_inputs=EXAMPLE, calibration=None)


def test_a_backward_pass_may_be_open_meanwhile() -> None:
    model = _net().eval()
    loss = model(torch.randn(2, *EXAMPLE.shape[1:])).sum()
    batude_fx.compress(model, 0.7, example_inputs=EXAMPLE)  # normalized by its images; the model's buffers stay
    loss.backward()


def test_a_budget_that_only_linear_layers_can_meet_says_so() -> None:
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
    assert batude_fx.plan(model, _smallest_reachable(caught.value), **options).flops == 29


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
def test_a_budget_that_cannot_be_meant_is_refused_in_one_line(budget: float | str) -> None:
    with pytest.raises(BudgetError, match=r"Write a fraction that remains \(0\.5\)") as caught:
        batude_fx.compress(_net(), budget, example_inputs=EXAMPLE)
    assert "\n" not in str(caught.value)


class Choosy(nn.Module):
    """Computes its head for the positions with small features only, as a detector does for the boxes it chooses."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, head)
        self.most = 0.0

    def forward(self, x: Tensor) -> Tensor:
        features = self.look(x)  # (1, 64, H, W)
        strength = features.abs().mean(1)  # (1, H, W)
        chosen: Tensor = self.head(features.movedim(1, -1)[strength < self.most])
        return chosen


def _choosy(head: int) -> tuple[Choosy, Tensor]:
    torch.manual_seed(0)
    model, x = Choosy(head), torch.randn(1, 32, 16, 16)
    with torch.no_grad():
        model.most = float(model.look(x).abs().mean(1).quantile(0.2))
    return model, x


def test_a_copy_that_chooses_more_boxes_gets_smaller_ranks_until_it_meets_the_budget() -> None:
    model, x = _choosy(head=64)
    plan = batude_fx.plan(model, 0.5, calibration=None, example_inputs=x)
    limit = 0.5 * _flops(model, x)
    assert _flops(plan._applied(model), x) > limit
    assert _flops(plan.apply(model), x) <= limit


def test_too_many_boxes_for_any_ranks_are_an_error() -> None:
    model, x = _choosy(head=4096)
    with pytest.raises(BudgetError, match=r"fvcore counts [0-9,]+ flops .* more boxes than the dense one"):
        batude_fx.compress(model, 0.9, calibration=None, example_inputs=x)


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
    before = _fingerprint(model)
    if error is None:
        batude_fx.compress(model, **options)
    else:
        with pytest.raises(error) as caught:
            batude_fx.compress(model, **options)
        assert "\n" not in str(caught.value)
    assert _fingerprint(model) == before


class Noisy(Net):
    """Draws from the global generator in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize("calibration", [None, "synthetic", _photos()])
def test_the_global_random_generator_stays_where_it_is(calibration: object) -> None:
    model = _hooked()
    model.__class__ = Noisy
    before = _fingerprint(model)
    batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=calibration)
    assert _fingerprint(model) == before


def _broken() -> Iterator[Tensor]:
    yield _photos()
    raise OSError("disk gone")


class Picky(Net):
    """Runs on the example input, and no further."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise OSError("disk gone")
        return super().forward(x)


@pytest.mark.parametrize(("kind", "calibration"), [(Net, _broken()), (Picky, _photos()), (Picky, "synthetic")])
def test_the_input_model_survives_what_others_raise(kind: type[Net], calibration: object) -> None:
    model = _hooked()
    model.__class__ = kind
    before = _fingerprint(model)
    with pytest.raises(OSError, match="disk gone"):
        batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=calibration)
    assert _fingerprint(model) == before


def test_images_of_another_size_are_refused_where_the_model_takes_one_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(1024, 4))
    with pytest.raises(CalibrationError, match="shape"):
        batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=torch.randn(4, 3, 10, 10))


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


def test_a_hook_of_the_user_is_called_in_the_result_too() -> None:
    model, heard = _net(), []
    model.depthwise.register_forward_hook(lambda module, *_: heard.append(module))
    small = batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=None)
    heard.clear()
    small(EXAMPLE)
    assert heard == [small.depthwise]


def test_the_result_can_be_copied_and_takes_its_own_state() -> None:
    small = batude_fx.compress(_net(), 0.6, example_inputs=EXAMPLE, calibration=_photos()).eval()
    twin = copy.deepcopy(small)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(twin(_photos()), small(_photos()))
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(_photos()), small(_photos()))


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


@pytest.fixture(scope="module")
def from_a_tensor() -> nn.Module:
    return batude_fx.compress(_net(), 0.6, example_inputs=EXAMPLE, calibration=_photos(16))


@pytest.mark.parametrize(
    "source",
    [
        lambda images: list(torch.split(images, 8)),
        lambda images: iter(torch.split(images, 8)),
        lambda images: DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=8),
    ],
    ids=["list", "iterator", "DataLoader with labels"],
)
def test_the_same_images_in_any_form_give_the_same_network(
    source: Callable[[Tensor], object], from_a_tensor: nn.Module
) -> None:
    small = batude_fx.compress(_net(), 0.6, example_inputs=EXAMPLE, calibration=source(_photos(16)))
    assert _same(small, from_a_tensor)


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


@pytest.mark.parametrize("calibration", ["synthetic", None, _photos(4)], ids=["synthetic", "none", "images"])
def test_new_tensors_may_lie_on_another_device_by_default(calibration: Tensor | str | None) -> None:
    model = _net()
    plan = batude_fx.plan(model, 0.6, example_inputs=EXAMPLE, calibration=calibration)
    with torch.device("meta"):
        other = batude_fx.plan(model, 0.6, example_inputs=EXAMPLE, calibration=calibration)
        assert _same(other.apply(model), plan.apply(model))


def test_branches_that_a_fresh_network_multiplies_by_zero_are_not_cut_to_nothing() -> None:
    """timm's fresh ResNets end every branch in a batch-norm of zero gain: no error in it reaches the outputs yet."""
    model = timm.create_model("resnet18").eval()
    assert not model.layer1[0].bn2.weight.any()
    plan = batude_fx.plan(model, 0.5, example_inputs=torch.zeros(1, 3, 32, 32))
    assert 0.99 * 0.5 < plan.flops / plan.dense_flops <= 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=r"compress model\.float\(\)"):
        batude_fx.compress(_net().to(dtype), 0.5, example_inputs=EXAMPLE.to(dtype))


@torch.inference_mode()
def test_inference_mode_is_refused_without_gradients_it_would_choose_other_ranks() -> None:
    with pytest.raises(UnsupportedError, match=r"outside.*torch\.no_grad\(\) is no hindrance"):
        batude_fx.compress(_net(), 0.5, example_inputs=EXAMPLE)


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = _net()
    with pytest.raises(UnsupportedError, match="make it outside"):
        batude_fx.compress(model, 0.5, example_inputs=EXAMPLE)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:.torch.jit.script.:DeprecationWarning")
def test_autocast_is_refused() -> None:
    with torch.autocast("cpu"), pytest.raises(UnsupportedError, match=r"in half precision; compress outside"):
        batude_fx.compress(_net(), 0.6, example_inputs=EXAMPLE)


def test_compiling_in_place_changes_nothing() -> None:
    model = _net()
    expected = batude_fx.compress(model, 0.6, example_inputs=EXAMPLE)
    model.compile(backend="eager")
    assert _same(batude_fx.compress(model, 0.6, example_inputs=EXAMPLE), expected)
    assert model._compiled_call_impl is not None


def test_wrappers_are_refused_with_what_to_compress_instead() -> None:
    wrappers: dict[str, Any] = {
        "its `_orig_mod`, then torch.compile": torch.compile(_net()),
        "its `module`": nn.DataParallel(_net()),
        "scripted from": torch.jit.script(_net()),
    }
    for words, wrapper in wrappers.items():
        with pytest.raises(UnsupportedError, match=words):
            batude_fx.compress(wrapper, 0.5, example_inputs=EXAMPLE)


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


# What a reviewer broke


def test_attention_counts_as_it_does_with_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3)
            self.more = nn.Conv2d(32, 32, 3)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.more(self.conv(x)).flatten(2).mT  # (N, positions, 32)
            out: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return out

    model = Net().eval()
    with torch.no_grad():
        small = batude_fx.compress(model, 0.8, calibration=None, example_inputs=EXAMPLE)
    assert _flops(small) <= 0.8 * _flops(model)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("calibration", [None, "synthetic"])
def test_a_weight_of_zeros_stays_finite(calibration: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3))
    nn.init.zeros_(model[1].weight)
    small = batude_fx.compress(model, 0.3, calibration=calibration, example_inputs=EXAMPLE)
    assert isinstance(small[1], batude_fx.tucker.modules.TuckerModule)
    assert all(parameter.isfinite().all() for parameter in small.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = _net()
    model.stem.weight.data[0, 0, 0, 0] = value
    with pytest.raises(UnsupportedError, match=r"stem\.weight holds NaN or infinite"):
        batude_fx.compress(model, 0.5, calibration=None, example_inputs=EXAMPLE)


class ByKeyword(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(input=x)
        return x


@pytest.mark.parametrize("calibration", [None, "synthetic"])
def test_layers_may_be_called_by_keyword(calibration: object) -> None:
    model = ByKeyword(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.ConvTranspose2d(32, 32, 3))
    small = batude_fx.compress(model, 0.5, calibration=calibration, example_inputs=EXAMPLE)
    assert small(EXAMPLE).shape == model(EXAMPLE).shape


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:.torch.jit.script.:DeprecationWarning")
def test_the_result_can_be_scripted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    small = batude_fx.compress(model, 0.5, calibration=None, example_inputs=EXAMPLE)
    torch.testing.assert_close(torch.jit.script(small)(EXAMPLE), small(EXAMPLE))


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = _net()
    vars(model)["lock"] = threading.Lock()
    with pytest.raises(BatudeError, match="cannot be copied"):
        batude_fx.compress(model, 0.6, example_inputs=EXAMPLE)


def test_a_plan_is_for_its_own_dtype() -> None:
    model = _net()
    plan = batude_fx.plan(model, 0.6, calibration=None, example_inputs=EXAMPLE)
    for other in (copy.deepcopy(model).double(), copy.deepcopy(model).half()):
        with pytest.raises(UnsupportedError, match=r"float(64|16)"):
            plan.apply(other)


@pytest.mark.parametrize("images", [7, [{"image": torch.zeros(1, 3, 12, 12)}], [()]])
def test_what_holds_no_images_is_refused(images: object) -> None:
    with pytest.raises(CalibrationError, match="not a tensor"):
        batude_fx.compress(_net(), 0.6, calibration=images, example_inputs=EXAMPLE)


@pytest.mark.parametrize("calibration", ["synthetic", _photos()])
def test_a_classifier_is_calibrated_too(calibration: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 400))
    small = batude_fx.compress(
        model, 0.95, calibration=calibration, layers="conv+linear", ranks={"0": None}, example_inputs=EXAMPLE
    )
    assert isinstance(small[3], TuckerModule)
    assert small(EXAMPLE).shape == (1, 400)


def test_the_result_trains_where_the_model_trains() -> None:
    for training in (True, False):
        small = batude_fx.compress(_net().train(training), 0.6, example_inputs=EXAMPLE)
        assert {module.training for module in small.modules()} == {training}


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5))


@pytest.mark.parametrize("calibration", [None, "synthetic", _photos()])
def test_a_model_may_work_in_place_on_its_input(calibration: object) -> None:
    model, x = _net(), EXAMPLE.clone()
    model.__class__ = InPlace
    batude_fx.compress(model, 0.6, calibration=calibration, example_inputs=x)
    assert torch.equal(x, EXAMPLE)


def test_a_layer_that_holds_more_stays_dense() -> None:
    model = _net()
    model.stem.register_buffer("gain", torch.ones(1))
    (stem,) = (site for site in batude_fx.discover(model, EXAMPLE) if site.name == "stem")
    assert stem.skip_reason == "holds more than a weight and a bias, which its replacement would lose"


def test_lazy_layers_and_names_of_models_are_refused() -> None:
    with pytest.raises(BatudeError, match="not initialized yet"):
        batude_fx.compress(nn.Sequential(nn.LazyConv2d(8, 3)), 0.5, example_inputs=EXAMPLE)
    with pytest.raises(UnsupportedError, match="'resnet18' is no model"):
        batude_fx.compress("resnet18", 0.5)  # type: ignore[type-var]
    with pytest.raises(SelectionError, match="give Ranks"):
        batude_fx.compress(_net(), 0.5, example_inputs=EXAMPLE, ranks={"stem": (8, 8)})
