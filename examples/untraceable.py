"""A model that torch.fx cannot trace: its branches depend on values. Its parts are traced instead.

python -m examples.untraceable
"""

import torch
from torch import Tensor, nn

import batude_fx


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    """A convolution with batch-norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


class EarlyExit(nn.Module):
    """A network that returns early if it is confident; the branch depends on the values of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 64)
        self.first = block(64, 64)
        self.second = nn.ModuleList(block(64, 64) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, 10)."""
        features = self.first(self.stem(images))
        guess: Tensor = self.head(features.mean((2, 3)))
        if guess.softmax(1).amax() < 0.99:
            for part in self.second:
                features = features + part(features)
            guess = self.head(features.mean((2, 3)))
        return guess


def main() -> None:
    """List the sites and how each was found, then compress."""
    torch.manual_seed(0)
    model = EarlyExit().eval()
    image = torch.randn(1, 3, 32, 32)

    sites = batude_fx.discover(model, image)  # a model of your own needs an example input
    print(sites)
    print("found by:", {site.name: site.found_by for site in sites})  # "child": in a part that can be traced

    small = batude_fx.compress(model, 0.5, example_inputs=image, calibration=torch.randn(64, 3, 32, 32))
    print(f"{type(small).__name__} again, its first block now:", small.first)


if __name__ == "__main__":
    main()
