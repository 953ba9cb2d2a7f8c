"""MONAI's DynUNet with deep supervision, in three dimensions, whose heads leave their outputs in a list."""

from pathlib import Path

import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceLoss
from monai.networks.nets import DynUNet
from torch import Tensor, nn

import batude_fx
from tests.others.common import (
    assert_close,
    assert_exported,
    assert_saved_and_loaded,
    assert_step_changes_factors,
    flops,
    noise,
    run_onnx,
    tucker_modules,
    unchanged,
)

pytestmark = pytest.mark.others

BUDGET = 0.6
EXAMPLE = noise(1, 1, 16, 16, 16)
SCANS = noise(2, 1, 16, 16, 16)
MASKS = (SCANS > 0.5).float()


def fresh() -> DynUNet:
    """Return a small DynUNet with the same random weights at each call."""
    torch.manual_seed(0)
    return DynUNet(
        spatial_dims=3, in_channels=1, out_channels=2, kernel_size=[3, 3, 3, 3], strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2], filters=[8, 16, 32, 64], deep_supervision=True, deep_supr_num=2,
    )  # fmt: skip


def call(network: nn.Module) -> object:
    return network(SCANS)


def supervised_loss(network: nn.Module) -> Tensor:
    """Return MONAI's own loss of all heads: the outputs are (N, heads, classes, D, H, W)."""
    outputs = network(SCANS)
    loss: Tensor = DeepSupervisionLoss(DiceLoss(softmax=True, to_onehot_y=True))(list(outputs.unbind(1)), MASKS)
    return loss


def trained() -> DynUNet:
    """Return a DynUNet after one step of training, whose `heads` hold the outputs of that step."""
    model = fresh().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    supervised_loss(model).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return model


@pytest.fixture(scope="module")
def small() -> DynUNet:
    """The compressed network, which no test changes."""
    return batude_fx.compress(fresh(), BUDGET, example_inputs=EXAMPLE)


def test_the_budget_holds_and_the_original_is_left_as_it_was() -> None:
    model = fresh()
    model.input_block.register_forward_hook(lambda *_: None)
    heads = list(model.heads)
    with unchanged(model):
        small = batude_fx.compress(model, BUDGET, example_inputs=EXAMPLE)
    assert flops(small, EXAMPLE) <= BUDGET * flops(model, EXAMPLE)
    assert all(now is before for now, before in zip(model.heads, heads, strict=True))
    assert len(small.input_block._forward_hooks) == 1


def test_the_copy_has_heads_of_its_own(small: DynUNet) -> None:
    assert small.skip_layers.next_layer.heads is small.heads
    small.train()
    try:
        with torch.no_grad():
            assert small(SCANS).shape == (2, 3, 2, 16, 16, 16)
            assert fresh().train()(SCANS).shape == (2, 3, 2, 16, 16, 16)
    finally:
        small.eval()


def test_a_trained_network_is_compressed() -> None:
    model = trained()
    heads = list(model.heads)
    small = batude_fx.compress(model, BUDGET, example_inputs=EXAMPLE)
    assert tucker_modules(small)
    assert all(now is before for now, before in zip(model.heads, heads, strict=True))
    same = fresh()  # with the same weights, and heads that never ran
    same.load_state_dict(model.state_dict())
    expected = batude_fx.compress(same, BUDGET, example_inputs=EXAMPLE)
    with torch.no_grad():
        assert torch.equal(small.eval()(SCANS), expected.eval()(SCANS))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_a_run_leaves_in_the_heads_is_no_hindrance(mode: str, tmp_path: Path) -> None:
    small = batude_fx.compress(fresh(), BUDGET, example_inputs=EXAMPLE, calibration=None).eval()
    with torch.no_grad():
        expected = small(SCANS)
    small.train(mode == "train")
    assert small(SCANS).requires_grad  # not under no_grad, so that the heads hold results with gradients
    small.eval()
    left = list(small.heads)
    assert_close(batude_fx.fold(small, EXAMPLE)(SCANS).detach(), expected)
    batude_fx.export(small, tmp_path / "small.onnx", example_inputs=EXAMPLE)
    assert_close(run_onnx(tmp_path / "small.onnx", [SCANS])[0], expected)
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path / "out")
    assert all(now is before for now, before in zip(small.heads, left, strict=True))
    loaded = batude_fx.load(tmp_path / "out", model=trained())
    with torch.no_grad():
        assert torch.equal(loaded(SCANS), expected)


def test_a_step_on_its_own_loss_changes_the_factors(small: nn.Module) -> None:
    assert_step_changes_factors(small, supervised_loss)


def test_saved_and_loaded_it_is_the_same_to_the_bit(small: nn.Module, tmp_path: Path) -> None:
    assert_saved_and_loaded(small, fresh(), call, tmp_path / "out")


def test_exported_it_computes_the_same_for_another_batch(small: nn.Module, tmp_path: Path) -> None:
    assert_exported(small, EXAMPLE, call, [SCANS], tmp_path / "small.onnx")
