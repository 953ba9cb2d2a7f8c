"""A copy whose batch-norms are measured on images has standard channels."""

import torch

from batude_fx.calibration.batch_norm import renormalize
from tests.toy_networks import small_net


def test_a_copy_normalized_by_images_gives_standard_channels() -> None:
    net = small_net().eval()
    images = torch.randn(32, 3, 7, 7) * 5 + 3
    vars(net[1])["momentum"] = 0.3
    adapted = renormalize(net, [(images,)])
    assert adapted[1].momentum == 0.3
    after = adapted[:2](images)
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(6), atol=1e-2, rtol=0)
    assert torch.equal(net[1].running_mean, torch.zeros(6))
