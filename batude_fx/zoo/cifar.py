"""ResNet and VGG for the images of CIFAR (32 x 32 pixels); importing this file registers them with timm.

Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385,
section 4.2: three stages of 16, 32 and 64 channels and parameter-free shortcuts (option A). VGG-16: K. Simonyan,
A. Zisserman, https://arxiv.org/abs/1409.1556, with batch-norm and a single linear layer, as pruning papers train it.
"""

from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["CifarResNet", "CifarVgg"]
_CONFIG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "conv1",
    "classifier": "fc",
}
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class _Block(nn.Module):
    """Two 3 x 3 convolutions, and a shortcut that subsamples pixels and pads the new channels with zeros."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))  # (N, C_out, H / stride, W / stride)
        y = self.bn2(self.conv2(y))
        if self.new_channels:
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet with three stages of n blocks, and 6 n + 2 layers.

    Args:
        depth: Number of layers: 20, 32, 44, 56 or 110.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the images.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.fc = nn.Linear(64, num_classes)
        _initialize_(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        rest = (_Block(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(_Block(in_channels, channels, stride), *rest)

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, C, 32, 32) to features (N, 64, 8, 8)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)  # (N, 16, 32, 32)
        x = self.layer2(x)  # (N, 32, 16, 16)
        out: Tensor = self.layer3(x)  # (N, 64, 8, 8)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, 32, 32) to logits (N, num_classes)."""
        logits: Tensor = self.fc(self.forward_features(x).mean((2, 3)))
        return logits


class CifarVgg(nn.Module):
    """VGG-16 with batch normalization and a single linear layer.

    Args:
        num_classes: Outputs of the classifier.
        in_chans: Channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 512
        layers: list[nn.Module] = []
        for stage in _VGG16:
            for channels in stage:
                layers += [nn.Conv2d(in_chans, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                in_chans = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(512, num_classes)
        _initialize_(self)

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, C, 32, 32) to features (N, 512, 1, 1)."""
        out: Tensor = self.features(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, 32, 32) to logits (N, num_classes)."""
        logits: Tensor = self.fc(self.forward_features(x).mean((2, 3)))
        return logits


def _initialize_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


default_cfgs = generate_default_cfgs({
    "resnet20_cifar.untrained": _CONFIG,
    "resnet56_cifar.untrained": _CONFIG,
    "vgg16_bn_cifar.untrained": _CONFIG | {"pool_size": (1, 1), "first_conv": "features.0"},
})  # fmt: skip


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401, FBT001, FBT002 - timm's
    """Create a ResNet-20: 41 million flops, 270 thousand parameters."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, depth=20, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401, FBT001, FBT002 - timm's
    """Create a ResNet-56: 127 million flops, 850 thousand parameters."""
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, depth=56, **kwargs)


@register_model
def vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401, FBT001, FBT002 - timm's
    """Create a VGG-16 with batch normalization: 314 million flops, 15 million parameters."""
    return build_model_with_cfg(CifarVgg, "vgg16_bn_cifar", pretrained, **kwargs)
