"""A network that is restored comes closer to its original on images that it was not taught with, or stays as it was."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import batude_fx
from batude_fx import CalibrationError
from batude_fx.graph.provenance import attached_record
from batude_fx.training import phase, restore
from tests.compression.common import EXAMPLE, same_bits
from tests.toy_networks import VariedNet

_STEPS = 40


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(restore, "_MOST", 16 * _STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return VariedNet().eval()


def _images(count: int = 80) -> Tensor:
    return torch.randn(count, *EXAMPLE.shape[1:], generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan() -> batude_fx.Plan:
    """A plan for `_network`, calibrated with images."""
    return batude_fx.plan(_network(), 0.5, example_inputs=EXAMPLE, calibration=_images(), round_to=2)


def test_the_network_comes_closer_on_images_held_back(plan: batude_fx.Plan) -> None:
    model, held_back = _network(), _images()[4::5]
    before, after = plan.apply(model), plan.apply(model, restore=True)
    with torch.no_grad():
        target, *outputs = (network(held_back).double().log_softmax(1) for network in (model, before, after))
    divergences = [float((target.exp() * (target - output)).sum(1).mean()) for output in outputs]
    assert divergences[1] < 0.9 * divergences[0]
    record = attached_record(after)
    assert record.quality.divergence.mean == pytest.approx(divergences[1], rel=1e-3)
    assert record.restoration.before.divergence.mean == pytest.approx(divergences[0], rel=1e-3)
    assert 0 < record.restoration.kept <= record.restoration.steps == _STEPS


def test_flags_formats_and_attributes_stay(plan: batude_fx.Plan) -> None:
    model = _network().requires_grad_(requires_grad=False)
    model.mix.train()
    before, after = (plan.apply(model, restore=each) for each in (False, True))
    for name, value in after.named_parameters():
        assert value.stride() == before.get_parameter(name).stride()
        assert not value.requires_grad
    assert [module.training for module in before.modules()] == [module.training for module in after.modules()]
    assert vars(before).keys() == vars(after).keys()
    assert not same_bits(before, after)


def test_another_accelerator_prepares_the_network(plan: batude_fx.Plan) -> None:
    restored = plan.apply(_network(), restore=True)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(restored)
    assert prepared(EXAMPLE).dtype is torch.float32  # accelerate converts outputs back
    assert "forward" in vars(prepared)


class _InPlace(nn.Module):
    """Normalizes its input in place, takes it by name, and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _network()

    def forward(self, mask: None = None, image: Tensor | None = None) -> dict[str, Tensor]:
        assert mask is None
        return {"logits": self.body(image.sub_(0.5).div_(0.25))}


def test_networks_may_change_their_input_take_it_by_name_and_give_a_dict() -> None:
    plan = batude_fx.plan(_InPlace().eval(), 0.5, example_inputs={"image": EXAMPLE}, calibration=_images(), round_to=2)
    record = attached_record(plan.apply(_InPlace().eval(), restore=True))
    assert record.quality.distance < 0.9 * record.restoration.before.distance


def test_inputs_that_are_no_images_are_taught_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 5), nn.Flatten(), nn.Linear(384, 4)).eval()
    signals = torch.randn(80, 3, 32, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"example_inputs": signals[:1], "round_to": 2, "restore": True}
    record = attached_record(batude_fx.compress(model, 0.5, calibration=signals, **options))
    assert record.quality.distance < record.restoration.before.distance
    pooled = nn.Sequential(*list(model)[:3], nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    with pytest.warns(UserWarning, match="24 and 32"), pytest.raises(CalibrationError, match="inputs of one shape"):
        batude_fx.compress(pooled, 0.5, calibration=[signals[:40], signals[:40, :, :24]], **options)


def test_the_same_call_gives_the_same_bits_and_leaves_everything_else(plan: batude_fx.Plan) -> None:
    model, same = _network(), _network()
    caller = Accelerator(cpu=True, gradient_accumulation_steps=4)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    networks = [plan.apply(model, restore=True) for _ in range(2)]
    assert same_bits(*networks)
    assert same_bits(model, same)
    assert not networks[0].training
    assert caller.gradient_accumulation_steps == 4
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())


def test_a_network_that_no_step_improves_stays_as_it_was(plan: batude_fx.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    step = phase._Trainer.step

    def harmful(self: Any, *arguments: Any) -> Tensor:
        loss = step(self, *arguments)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1)
        return loss

    monkeypatch.setattr(phase._Trainer, "step", harmful)
    model = _network()
    restored = plan.apply(model, restore=True)
    assert same_bits(restored, plan.apply(model))
    assert attached_record(restored).restoration.kept == 0
    assert "stays as it was" in str(attached_record(restored).restoration)


def test_a_loss_that_is_not_finite_ends_it_with_the_best_network_so_far(
    plan: batude_fx.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = phase._Trainer.step

    def diverging(self: Any, index: int, *arguments: Any) -> Tensor:
        loss = step(self, index, *arguments)
        return loss * float("nan") if index == _STEPS // 2 else loss

    monkeypatch.setattr(phase._Trainer, "step", diverging)
    with pytest.warns(UserWarning, match=f"not finite, after {_STEPS // 2 + 1} of {_STEPS} steps"):
        restoration = attached_record(plan.apply(_network(), restore=True)).restoration
    assert 0 < restoration.kept < restoration.steps == _STEPS // 2 + 1


def test_an_interruption_before_the_first_step_returns_the_network_as_it_is(
    plan: batude_fx.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = restore.Teacher

    def slow(*arguments: Any, **settings: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return teacher(*arguments, **settings)

    monkeypatch.setattr(restore, "Teacher", slow)
    with pytest.warns(UserWarning, match=f"stopped after 0 of {_STEPS} steps"):
        restored = plan.apply(_network(), restore=True)
    assert same_bits(restored, plan.apply(_network()))


def test_an_interruption_returns_the_best_network_so_far(plan: batude_fx.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    step = phase._Trainer.step

    def interrupted(self: Any, index: int, *arguments: Any) -> Tensor:
        if index == _STEPS // 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, index, *arguments)

    monkeypatch.setattr(phase._Trainer, "step", interrupted)
    with pytest.warns(UserWarning, match=f"stopped after {_STEPS // 2 + 1} of {_STEPS} steps"):
        restored = plan.apply(_network(), restore=True)
    restoration = attached_record(restored).restoration
    assert 0 < restoration.kept <= restoration.steps == _STEPS // 2 + 1


def test_the_images_of_any_loader_serve() -> None:
    model, images = _network(), _images()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(len(images))), 7)
    options: dict[str, Any] = {"example_inputs": EXAMPLE, "round_to": 2, "restore": True}
    networks = [
        batude_fx.compress(model, 0.5, calibration=each, **options) for each in (images, loader, iter([images]))
    ]
    assert same_bits(networks[0], networks[1])
    assert same_bits(networks[0], networks[2])


def test_other_outputs_than_classes_are_restored(tmp_path: Path) -> None:
    class Features(nn.Module):
        num_classes = 0

        def __init__(self) -> None:
            super().__init__()
            self.body = _network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"map": self.body.mix(self.body.stem(x)), "index": torch.arange(len(x))}

    model = Features().eval()
    restored = batude_fx.compress(model, 0.5, example_inputs=EXAMPLE, calibration=_images(), round_to=2, restore=True)
    record = attached_record(restored)
    assert record.quality.distance < record.restoration.before.distance
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(restored, tmp_path / "out")
    assert "before, it had" in " ".join((tmp_path / "out" / "report.html").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "images of its task"),
        ("synthetic", "images of its task"),
        (_images(30), "fewer than 40 images"),
    ],
    ids=["none", "generated", "few"],
)
def test_where_nothing_can_be_taught_is_said(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        batude_fx.compress(_network(), 0.5, example_inputs=EXAMPLE, calibration=calibration, round_to=2, restore=True)
