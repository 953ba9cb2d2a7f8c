"""Batch-norm folding against the network that keeps its batch-norms, in float64."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

import batude_fx

NORMS = (nn.modules.batchnorm._BatchNorm, torchvision.ops.misc.FrozenBatchNorm2d)


def _with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, NORMS) and norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            if norm.weight is not None:
                norm.weight.data.uniform_(0.5, 1.5)
                norm.bias.data.normal_(0, 0.3)
    return model.double().eval()


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "efficientnet_b0", "regnetx_002", "densenet121"])
@torch.no_grad()
def test_folding_keeps_the_outputs_of_dense_and_compressed_networks(name: str) -> None:
    model = _with_statistics(timm.create_model(name))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    small = batude_fx.compress(model, 0.85, example_inputs=x[:1], calibration=None)
    for network in (model, small):
        folded = batude_fx.fold(network, x[:1])
        assert type(folded) is type(network)
        torch.testing.assert_close(folded(x), network(x), rtol=1e-9, atol=1e-9)
        # DenseNet normalizes what it has concatenated: no layer's output.
        assert (_norms(folded) > 0) == (name == "densenet121")
        assert _norms(folded) < _norms(network)


@torch.no_grad()
def test_half_precision_is_rounded_once() -> None:
    model = _with_statistics(timm.create_model("resnet10t"))  # float64
    x = torch.randn(1, 3, 64, 64)
    coarse = copy.deepcopy(model).bfloat16()
    folded = batude_fx.fold(coarse, x.bfloat16()).state_dict()
    exact = batude_fx.fold(copy.deepcopy(coarse).double(), x.double()).bfloat16().state_dict()
    assert folded.keys() == exact.keys()
    for name, value in folded.items():
        assert value.dtype is torch.bfloat16
        assert (value != exact[name]).float().mean() < 0.02, name  # float32 falls on the other side of a tie


def _layers(convolution: nn.Module, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, norm)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (_layers(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
        (_layers(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (2, 4, 5, 5, 5)),
        (_layers(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
        (_layers(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
        (_layers(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), (2, 4, 5, 5)),
        (_layers(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, affine=False)), (2, 4, 5, 5)),
        (_layers(nn.Conv2d(4, 6, 3), torchvision.ops.misc.FrozenBatchNorm2d(6)), (2, 4, 5, 5)),
        (_layers(nn.Conv2d(4, 6, 3), BatchNormAct2d(6, act_layer=nn.SiLU)), (2, 4, 5, 5)),
        (_layers(nn.Linear(4, 6), nn.BatchNorm1d(6)), (8, 4)),
    ],
    ids=lambda value: repr(value[0])[:18] if isinstance(value, nn.Module) else "",
)
@torch.no_grad()
def test_every_kind_of_layer_and_norm_is_folded(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    model = _with_statistics(model)
    folded = batude_fx.fold(model, x)
    assert _norms(folded) == 0
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert _norms(model) == 1  # the argument is left as it is


class _Odd(nn.Module):
    """Layers whose output does not go to one batch-norm alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> object:  # noqa: PLR0911 - one a way
        y = self.conv(x)
        if self.how == "used twice":
            return self.norm(y) + y
        if self.how == "returned too":
            return self.norm(y), y
        if self.how == "two norms":
            return self.norm(y) + self.other(y)
        if self.how == "written to":
            y[:, :2] = 0
        if self.how == "read as numbers":
            return self.norm(y) + sum(y.flatten().tolist())
        if self.how == "weight used elsewhere":
            return self.norm(y) + torch.nn.functional.conv2d(x, self.conv.weight)
        if self.how == "called twice":
            return self.norm(y) + self.conv(x + 1)
        if self.how == "something between":
            y = y.relu()
        return self.norm(self.norm(y)) if self.how == "norm called twice" else self.norm(y)


@pytest.mark.parametrize(
    "how",
    [
        "used twice",
        "returned too",
        "two norms",
        "called twice",
        "norm called twice",
        "something between",
        "written to",
        "read as numbers",
        "weight used elsewhere",
    ],
)
@torch.no_grad()
def test_norms_that_cannot_be_folded_are_left_alone(how: str) -> None:
    model, x = _with_statistics(_Odd(how)), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    folded = batude_fx.fold(model, x)
    assert _norms(folded) == 2
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("place", ["conv", "norm"])
@torch.no_grad()
def test_layers_with_a_hook_or_another_forward_are_left_alone(place: str) -> None:
    model, x = _with_statistics(_Odd("plain")), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert _norms(batude_fx.fold(model, x)) == 1
    handle = model.get_submodule(place).register_forward_hook(lambda _module, _args, output: output + 1)
    assert _norms(batude_fx.fold(model, x)) == 2
    handle.remove()
    layer = model.get_submodule(place)
    vars(layer)["forward"] = lambda x: x * 2
    folded = batude_fx.fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


def test_unbatched_inputs_are_left_alone() -> None:
    model, x = _with_statistics(_layers(nn.Conv1d(4, 9, 1), nn.BatchNorm1d(9))), torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(batude_fx.fold(model, x)(x), model(x))


def test_a_linear_layer_over_tokens_is_no_neighbour_of_a_norm_over_channels() -> None:
    model = _with_statistics(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)))
    assert _norms(batude_fx.fold(model, torch.randn(2, 5, 4, dtype=torch.float64))) == 1
