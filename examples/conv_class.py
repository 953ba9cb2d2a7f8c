"""A convolution class of your own: it stays dense until a handler says which weight it convolves with.

python -m examples.conv_class
"""

import torch
from torch import Tensor, nn

import batude_fx


def centered_weight(layer: nn.Module) -> Tensor:
    """Return the weight (C_out, C_in, k, k) that a `CenteredConv2d` convolves with."""
    weight = layer.get_parameter("weight")
    return weight - weight.mean(dim=(1, 2, 3), keepdim=True)


class CenteredConv2d(nn.Conv2d):
    """A convolution that subtracts the mean of each filter in every forward pass."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Map images (N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        y: Tensor = self._conv_forward(input, centered_weight(self), self.bias)
        return y


def main() -> None:
    """Discover, register, discover again; then compress a weight of low rank without an error."""
    torch.manual_seed(0)
    model = nn.Sequential(CenteredConv2d(3, 64, 3), nn.ReLU(), CenteredConv2d(64, 64, 3)).double().eval()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    print("before:", [site.skip_reason for site in batude_fx.discover(model, image)])

    batude_fx.register(CenteredConv2d, batude_fx.Handler(weight=centered_weight))
    print("after:", [site.skip_reason for site in batude_fx.discover(model, image)])

    # The second half of the input channels repeats the first: mode 1 of the weight has rank 32, so rank 32 is exact.
    with torch.no_grad():
        weight = model.get_parameter("2.weight")
        weight[:, 32:] = weight[:, :32]
    ranks = {"0": None, "2": batude_fx.Ranks(rank_out=64, rank_in=32)}
    plan = batude_fx.plan(model, 0.9, example_inputs=image, calibration=None, ranks=ranks)
    print(plan)
    error = (plan.apply(model)(image) - model(image)).norm() / model(image).norm()
    print(f"relative error of the outputs: {error.item():.0e}")


if __name__ == "__main__":
    main()
