"""Models that do what few do in their forward, their `train` or their attributes, through the whole of `compress`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import batude_fx
from batude_fx.errors import CalibrationError, DiscoveryError, UnsupportedError
from batude_fx.tucker.modules import TuckerModule
from tests.toy_networks import InPlace, OutOfPlace, TwoConvolutions

IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class NoSelf(TwoConvolutions):
    """Returns nothing from `train`, and so from `eval`, as networks of mmcv do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.n.eval()


class HalfInside(TwoConvolutions):
    """Computes in half precision inside its forward, by autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class OneByOne(TwoConvolutions):
    """Convolutions of images without a batch axis; batch-norm would need one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(self.a(image).relu()).mean((1, 2)) for image in x])


class AtATime(TwoConvolutions):
    """Takes a time before its images, as the right side of a differential equation does."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + t)


class TakesMask(TwoConvolutions):
    """Multiplies its images by a mask, which may be None."""

    def forward(self, mask: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x if mask is None else x * mask)


class Tokens(nn.Module):
    """One-dimensional convolutions of embedded words, whose input is integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e = nn.Embedding(100, 64)
        self.c = nn.Conv1d(64, 64, 3)
        self.d = nn.Conv1d(64, 64, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.d(self.c(self.e(tokens).transpose(1, 2)).relu()).mean(-1)
        return y


class SometimesEmpty(TwoConvolutions):
    """Runs its layers on bright images only, as a detector finds nothing in dark ones."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.a(x[x.mean((1, 2, 3)) > 0.1])
        y: Tensor = self.b(found.relu()).mean((2, 3))
        return y


def _weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("calibration", ["synthetic", "images"])
def test_a_model_that_works_in_place_is_compressed_as_if_it_did_not(calibration: str) -> None:
    mine = IMAGES.clone()
    shown = mine if calibration == "images" else calibration
    plans = [
        batude_fx.plan(net, 0.5, example_inputs=IMAGES[:1], calibration=shown) for net in (InPlace(), OutOfPlace())
    ]
    for plan in plans:
        for ours, theirs in zip(_weights(plan.apply(InPlace())), _weights(plan.apply(OutOfPlace())), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert torch.equal(mine, IMAGES)
    assert plans[0].ranks == plans[1].ranks


def test_eval_need_not_return_the_model(tmp_path: Path) -> None:
    model = NoSelf()
    small = batude_fx.compress(model, 0.6, example_inputs=IMAGES[:1])
    assert any(isinstance(module, TuckerModule) for module in small.modules())
    small.eval()
    expected = small(IMAGES)
    torch.testing.assert_close(batude_fx.fold(small, IMAGES[:1])(IMAGES), expected)
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path / "out")
    assert torch.equal(batude_fx.load(tmp_path / "out", model=model)(IMAGES), expected)
    batude_fx.export(small, tmp_path / "small.pt2", example_inputs=IMAGES[:2])


@pytest.mark.parametrize("place", ["forward", "stem"])
def test_a_function_that_closes_over_the_model_is_refused(place: str) -> None:
    model = TwoConvolutions()
    dense = model.forward
    functions = {"forward": lambda x: dense(x).softmax(-1), "stem": lambda x: model.a(x).relu()}
    setattr(model, place, functions[place])
    with pytest.raises(
        UnsupportedError, match=rf"^{place} is or holds a function that closes over the .*TwoConvolutions, so"
    ):
        batude_fx.compress(model, 0.6, example_inputs=IMAGES[:1], calibration=None)


def test_a_function_that_closes_over_other_things_is_copied() -> None:
    model, offset, teacher = TwoConvolutions(), torch.ones(1), TwoConvolutions()
    vars(model)["shift"] = lambda x: x + offset + teacher(x).mean()
    assert batude_fx.compress(model, 0.6, example_inputs=IMAGES[:1], calibration=None).shift is model.shift


@pytest.mark.parametrize("calibration", ["synthetic", IMAGES])
def test_autocast_inside_the_forward_is_allowed(calibration: str | Tensor) -> None:
    small = batude_fx.compress(HalfInside(), 0.6, example_inputs=IMAGES[:1], calibration=calibration)
    same = batude_fx.compress(TwoConvolutions(), 0.6, example_inputs=IMAGES[:1], calibration=calibration)
    gap = small(IMAGES) - same(IMAGES)
    assert gap.norm() / same(IMAGES).norm() < 0.05
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}


@pytest.mark.parametrize(("model", "inputs"), [
    (OneByOne(), (IMAGES[:1],)), (AtATime(), (torch.tensor(0.3), IMAGES[:1])), (TakesMask(), (None, IMAGES[:1])),
    (Tokens(), (torch.arange(20)[None],)),
])  # fmt: skip
def test_models_with_unusual_arguments_are_compressed(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    small = batude_fx.compress(model, 0.6, example_inputs=inputs)
    expected = model.eval()(*inputs)
    assert (small.eval()(*inputs) - expected).norm() / expected.norm() < 0.9


def test_integers_are_calibrated_with_integers() -> None:
    tokens = torch.randint(0, 100, (16, 20), generator=torch.Generator().manual_seed(0))
    plan = batude_fx.plan(Tokens(), 0.6, example_inputs=tokens[:1], calibration=tokens)
    assert plan.calibration == "images"
    assert batude_fx.plan(Tokens(), 0.6, example_inputs=tokens[:1]).calibration == "synthetic noise"
    with pytest.raises(CalibrationError, match=r"is torch\.float32, the model takes torch\.int64; do not convert them"):
        batude_fx.plan(Tokens(), 0.6, example_inputs=tokens[:1], calibration=tokens.float())
    with pytest.raises(CalibrationError, match="index out of range"):
        batude_fx.plan(Tokens(), 0.6, example_inputs=tokens[:1], calibration=tokens + 1000)


@pytest.mark.parametrize("order", [lambda dark, light: (dark, light), lambda dark, light: (light, dark)])
def test_batches_in_which_a_layer_sees_nothing_do_not_count(order: Callable[..., tuple[Tensor, ...]]) -> None:
    light = IMAGES[:8] + 0.5
    small = batude_fx.compress(
        SometimesEmpty(), 0.6, example_inputs=light[:1], calibration=list(order(torch.zeros(8, 3, 16, 16), light))
    )
    same = batude_fx.compress(SometimesEmpty(), 0.6, example_inputs=light[:1], calibration=[light])
    assert all(parameter.isfinite().all() for parameter in small.parameters())
    torch.testing.assert_close(small(light), same(light), rtol=0.2, atol=0.02)


def test_outputs_that_cannot_be_traced_are_refused_in_few_words() -> None:
    class Wrapped(TwoConvolutions):
        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"logits": super().forward(x)})()

    with pytest.raises(DiscoveryError, match="plain tensors") as caught:
        batude_fx.compress(Wrapped(), 0.6, example_inputs=IMAGES[:1])
    assert len(str(caught.value)) < 500


def test_a_budget_that_the_dense_network_meets_gives_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"nothing is replaced: the dense TwoConvolutions meets the budget, flops 50"):
        small = batude_fx.compress(TwoConvolutions(), "50GFLOPs", example_inputs=IMAGES[:1], calibration=None)
    assert not any(isinstance(module, TuckerModule) for module in small.modules())


def test_batch_norms_shared_by_processes_are_saved_by_name(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=3).eval()
    small = batude_fx.compress(model, 0.6, example_inputs=torch.rand(1, 3, 64, 64), calibration=None)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(small)  # type: ignore[no-untyped-call]
    batude_fx.save(shared, tmp_path / "out")
    assert torch.equal(batude_fx.load(tmp_path / "out")(IMAGES), small(IMAGES))


def test_a_norm_whose_gain_is_used_elsewhere_is_not_folded() -> None:
    class Gained(TwoConvolutions):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.n(self.a(x)) * self.n.weight.view(1, -1, 1, 1)
            return y

    model = Gained().eval()
    torch.testing.assert_close(batude_fx.fold(model, IMAGES[:1])(IMAGES), model(IMAGES))
