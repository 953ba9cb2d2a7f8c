"""A copy whose batch-norms are measured on images has standard channels."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn

from batude_fx import CalibrationError
from batude_fx.calibration.batch_norm import renormalize
from batude_fx.support.inputs import Inputs
from tests.toy_networks import small_net


def test_a_copy_normalized_by_images_gives_standard_channels() -> None:
    net = small_net().eval()
    images = torch.randn(32, 3, 7, 7) * 5 + 3
    vars(net[1])["momentum"] = 0.3
    adapted = renormalize(net, [Inputs((images,))])
    assert adapted[1].momentum == 0.3
    after = adapted[:2](images)
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(6), atol=1e-2, rtol=0)
    assert torch.equal(net[1].running_mean, torch.zeros(6))


def test_batch_norms_shared_by_processes_measure_like_others() -> None:
    """In a process group torch's SyncBatchNorm refuses to train on a CPU; an error there once went unnoticed."""
    net, images = small_net().eval(), torch.randn(8, 3, 7, 7)
    expected = renormalize(net, [Inputs((images,))])[1]
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        adapted = renormalize(shared, [Inputs((images,))])[1]
    finally:
        dist.destroy_process_group()
    assert type(adapted) is nn.SyncBatchNorm
    assert torch.equal(adapted.running_mean, expected.running_mean)
    assert torch.equal(adapted.running_var, expected.running_var)


def test_the_class_of_a_batch_norm_does_not_matter() -> None:
    """timm's batch-norms have an activation, which those that processes share have too."""
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=5).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
    shared = convert_sync_batchnorm(copy.deepcopy(net)).eval()  # type: ignore[no-untyped-call]
    batches = [Inputs((torch.randn(8, 3, 32, 32),)) for _ in range(2)]
    expected, found = renormalize(net, batches), renormalize(shared, batches)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    assert [type(module) for module in found.modules()] == [type(module) for module in shared.modules()]


def test_the_moments_are_those_of_training() -> None:
    net, batches = small_net(), [torch.randn(8, 3, 7, 7) * 3 + 1 for _ in range(3)]
    found = renormalize(net, [Inputs((batch,)) for batch in batches])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # torch's cumulative average
    for batch in batches:
        net.train()(batch)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(found.state_dict()[name], net.state_dict()[name])


def test_a_single_value_per_channel_leaves_the_model_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert renormalize(net, [Inputs((torch.randn(1, 3, 3, 3),))]) is net


def test_other_errors_are_not_taken_for_a_single_value() -> None:
    class Refuses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(f"no images of {tuple(x.shape)}")

    net = nn.Sequential(nn.BatchNorm2d(3), Refuses()).eval()
    with pytest.raises(CalibrationError, match="batch-norms are measured: no images of"):
        renormalize(net, [Inputs((torch.randn(2, 3, 3, 3),))])
