"""The networks for CIFAR have the sizes that their papers state."""

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis


def test_the_networks_of_the_cifar_papers_have_their_sizes() -> None:
    image = torch.zeros(1, 3, 32, 32)
    for name, flops, params in (
        ("resnet20_cifar", 40.9e6, 0.27e6), ("resnet56_cifar", 126.6e6, 0.85e6), ("vgg16_bn_cifar", 313.8e6, 14.7e6)
    ):  # fmt: skip
        model = timm.create_model(name).eval()
        assert model(image).shape == (1, 10)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=0.02)
        assert FlopCountAnalysis(model, image).unsupported_ops_warnings(enabled=False).total() == pytest.approx(
            flops, rel=0.01
        )
