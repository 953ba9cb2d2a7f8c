"""The compressed network is a network as any other: it keeps what it had, trains, and can be copied and scripted."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import batude_fx
from batude_fx.tucker.modules import TuckerModule
from tests.compression.common import (
    EXAMPLE,
    hooked_net,
    photos,
    same_bits,
)
from tests.toy_networks import VariedNet, varied_net


def test_untouched_layers_keep_their_keys_values_hooks_and_modes() -> None:
    model = hooked_net()
    small = batude_fx.compress(model, 0.6, example_inputs=EXAMPLE)
    assert type(small) is VariedNet
    replaced = {name for name, module in small.named_modules() if isinstance(module, TuckerModule)}
    assert replaced
    untouched = {k: v for k, v in model.state_dict().items() if not any(k.startswith(f"{n}.") for n in replaced)}
    assert untouched
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in untouched.items())
    assert small.training
    assert not small.norm.training
    assert len(small.depthwise._forward_hooks) == 1


def test_a_hook_of_the_user_is_called_in_the_result_too() -> None:
    model, heard = varied_net(), []
    model.depthwise.register_forward_hook(lambda module, *_: heard.append(module))
    small = batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=None)
    heard.clear()
    small(EXAMPLE)
    assert heard == [small.depthwise]


def test_the_result_can_be_copied_and_takes_its_own_state() -> None:
    small = batude_fx.compress(varied_net(), 0.6, example_inputs=EXAMPLE, calibration=photos()).eval()
    twin = copy.deepcopy(small)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(twin(photos()), small(photos()))
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(photos()), small(photos()))


def test_a_backward_pass_reaches_every_factor() -> None:
    small = batude_fx.compress(varied_net(), 0.5, example_inputs=EXAMPLE).train()
    small(photos()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in small.named_parameters() if "bias" not in n)


def test_a_timm_model_keeps_its_methods() -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    small = batude_fx.compress(model, 0.5, calibration=None, example_inputs=torch.zeros(1, 3, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    assert small.forward_features(images).shape == (2, 512, 2, 2)
    assert small.feature_info == model.feature_info
    small.reset_classifier(3)
    assert small(images).shape == (2, 3)
    assert small.pretrained_cfg == {**vars(model)["pretrained_cfg"], "input_size": (3, 64, 64)}


def test_float64_stays_float64() -> None:
    small = batude_fx.compress(varied_net().double(), 0.6, example_inputs=EXAMPLE.double())
    assert all(parameter.dtype == torch.float64 for parameter in small.parameters())
    assert small(EXAMPLE.double()).dtype == torch.float64


def test_two_calls_give_the_same_bits() -> None:
    first, second = (batude_fx.compress(varied_net(), 0.5, example_inputs=EXAMPLE) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("calibration", [None, "synthetic"])
def test_a_weight_of_zeros_stays_finite(calibration: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3))
    nn.init.zeros_(model[1].weight)
    small = batude_fx.compress(model, 0.3, calibration=calibration, example_inputs=EXAMPLE)
    assert isinstance(small[1], batude_fx.tucker.modules.TuckerModule)
    assert all(parameter.isfinite().all() for parameter in small.parameters())


class ByKeyword(nn.Sequential):
    """Calls its layers with a keyword argument."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(input=x)
        return x


@pytest.mark.parametrize("calibration", [None, "synthetic"])
def test_layers_may_be_called_by_keyword(calibration: object) -> None:
    model = ByKeyword(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.ConvTranspose2d(32, 32, 3))
    small = batude_fx.compress(model, 0.5, calibration=calibration, example_inputs=EXAMPLE)
    assert small(EXAMPLE).shape == model(EXAMPLE).shape


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:.torch.jit.script.:DeprecationWarning")
def test_the_result_can_be_scripted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    small = batude_fx.compress(model, 0.5, calibration=None, example_inputs=EXAMPLE)
    torch.testing.assert_close(torch.jit.script(small)(EXAMPLE), small(EXAMPLE))


def test_the_result_has_the_training_mode_of_the_model() -> None:
    for training in (True, False):
        small = batude_fx.compress(varied_net().train(training), 0.6, example_inputs=EXAMPLE)
        assert {module.training for module in small.modules()} == {training}
