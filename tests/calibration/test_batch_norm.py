"""A copy whose batch-norms are measured on images has standard channels."""

import pytest
import torch
import torch.distributed as dist
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
