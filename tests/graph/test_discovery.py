"""Discovery finds the sites that toy networks expect, all reasons to stay dense and every convolution of timm."""

import copy
from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import batude_fx
from batude_fx.errors import DiscoveryError, SelectionError
from batude_fx.graph.discovery import discover
from batude_fx.graph.example_inputs import example_inputs
from batude_fx.graph.sites import ConvSite
from tests.toy_networks import NETS_WITH_SITES, NetWithSites, conv, site


@pytest.mark.parametrize("network", NETS_WITH_SITES, ids=lambda network: network.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_networks_have_the_sites_they_expect(network: type[NetWithSites], training: bool) -> None:
    model = network().train(training)
    assert discover(model, model.inputs) == network.sites


class _Cached(nn.Module):
    """Keeps a tensor with its class, which outlives every copy."""

    cache: ClassVar[dict[str, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if "position" not in self.cache:
            self.cache["position"] = torch.ones_like(y)
        return y + self.cache["position"]


def test_no_proxy_of_the_tracer_stays_in_a_cache_of_the_class() -> None:
    discover(_Cached(), NetWithSites.inputs)
    assert type(_Cached.cache["position"]) is Tensor
    _Cached()(*NetWithSites.inputs)


def test_linear_layers_are_listed_on_request() -> None:
    model = nn.Sequential(conv(), nn.Flatten(2), nn.Linear(64, 3, bias=False))
    linear = {"kind": "Linear", "in_channels": 64, "out_channels": 3, "kernel_size": (), "has_bias": False}
    assert discover(model, NetWithSites.inputs, layers="conv+linear") == (
        site("0"),
        site("2", **linear, positions_in=4, positions_out=4),
    )


def test_attention_reads_a_weight_without_calling_its_layer() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    sites = {conv_site.name: conv_site for conv_site in discover(model, (torch.ones(5, 8),), layers="conv+linear")}
    assert sites.keys() == {"0.self_attn.out_proj", "0.linear1", "0.linear2"}
    assert all("weight" in str(conv_site.skip_reason) for conv_site in sites.values())


def test_parts_of_a_tucker_module_cannot_be_replaced_again() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    x = torch.ones(1, 3, 8, 8)
    small = batude_fx.compress(net, 0.5, calibration=None, example_inputs=x)
    reasons = [part.skip_reason for part in discover(small, (x,)) if part.name.startswith("1.")]
    assert reasons
    assert set(reasons) == {"is part of a Tucker module already"}


def test_a_model_that_is_a_single_layer_cannot_be_replaced() -> None:
    (root,) = discover(conv(), NetWithSites.inputs)
    assert root == site("", skip_reason="is the model itself; wrap it in nn.Sequential")


class Selectable(NetWithSites):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv()
        self.layer1 = nn.Sequential(conv(), conv(groups=4))
        self.layer2 = nn.Sequential(conv(), self.stem)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer2(self.layer1(self.stem(x)))
        return y


@pytest.mark.parametrize(
    ("include", "exclude", "reasons"),
    [
        ((), (), [None, None, "depthwise, nothing to decompose", None]),
        ("layer1.*", (), ["not included", None, "depthwise, nothing to decompose", "not included"]),
        (["layer2.1", "layer2.0"], (), [None, "not included", "depthwise, nothing to decompose", None]),
        (
            (),
            ("stem", "*.0"),
            ["excluded by 'stem'", "excluded by '*.0'", "depthwise, nothing to decompose", "excluded by '*.0'"],
        ),
        ("layer*", "layer2.1", ["excluded by 'layer2.1'", None, "depthwise, nothing to decompose", None]),
    ],
)
def test_globs_select_by_every_name(include: str, exclude: str, reasons: list[str | None]) -> None:
    sites = discover(Selectable(), NetWithSites.inputs, include=include, exclude=exclude)
    assert [conv_site.name for conv_site in sites] == ["stem", "layer1.0", "layer1.1", "layer2.0"]
    assert [conv_site.skip_reason for conv_site in sites] == reasons


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error_with_suggestions(argument: str) -> None:
    with pytest.raises(SelectionError, match=r"'layer1\.O' matches none of the 4 sites.*layer1\.0"):
        discover(Selectable(), NetWithSites.inputs, **{argument: ("stem", "layer1.O")})


def test_unknown_layers_are_an_error() -> None:
    with pytest.raises(SelectionError, match="'linear' is not known; use one of 'conv', 'conv\\+linear'"):
        discover(Selectable(), NetWithSites.inputs, layers="linear")


@pytest.mark.parametrize(
    ("model", "layers", "inputs", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "conv", None, 'no convolution among its 2 .* Use layers="conv\\+linear"'),
        (nn.Sequential(nn.ReLU()), "conv", NetWithSites.inputs, "no convolution among its 2 modules. Pass the network"),
        (nn.Sequential(nn.ReLU()), "conv+linear", NetWithSites.inputs, "no convolution or linear layer"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "conv", NetWithSites.inputs, "'0.weight' is lazy.*run it once"),
        (nn.Sequential(conv()), "conv", None, "no timm or torchvision model.*Pass example_inputs="),
    ],
)  # fmt: skip
def test_models_without_layers_to_replace_are_refused(model: nn.Module, layers: str, inputs: Any, message: str) -> None:
    with pytest.raises(DiscoveryError, match=message):
        discover(model, inputs, layers=layers)


class KeepsThings(nn.Module):
    """A network whose run changes attributes, a dict and batch-norm statistics, and that is partly in eval mode."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)
        self.cache: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        self.train()
        self.norm.eval()
        self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.cache["x"] = x
        self.steps.add_(1)
        y: Tensor = self.norm(self.conv(x))
        return y


def everything(model: nn.Module) -> list[object]:
    """Return the state of a model: values of its tensors, and its attributes and hooks by identity."""
    state = [(name, value.clone().tolist()) for name, value in model.state_dict().items()]
    attributes = [sorted((k, id(v)) for k, v in vars(module).items()) for module in model.modules()]
    hooks = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    return [state, attributes, hooks, [list(vars(module).get("cache", ())) for module in model.modules()]]


def test_the_model_is_given_back_as_it_was() -> None:
    model = KeepsThings()
    before, generator = everything(model), torch.get_rng_state()
    discover(model, NetWithSites.inputs)
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_users_hooks_and_caches_see_no_proxies() -> None:
    model = timm.create_model("pit_ti_224", features_only=True)  # keeps outputs by the device of the input
    output_types: list[object] = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda _module, _inputs, output: output_types.append(type(output)))
    discover(model, torch.zeros(1, 3, 224, 224))
    assert output_types == [Tensor]
    copy.deepcopy(model)


def test_a_model_that_does_not_run_is_given_back_too() -> None:
    model = KeepsThings()
    before = everything(model)
    message = (
        r"KeepsThings does not run on the example input of shape \(1, 5, 8, 8\): RuntimeError: .*Pass example_inputs="
    )
    with pytest.raises(DiscoveryError, match=message) as caught:
        discover(model, (torch.ones(1, 5, 8, 8),))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert everything(model) == before


def test_a_model_that_cannot_be_traced_can_be_discovered() -> None:
    class Hostile(NetWithSites):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> Tensor:
            if type(x) is not Tensor:
                raise KeyError("no proxies here")
            y: Tensor = self.conv(x)
            return y

    assert discover(Hostile(), NetWithSites.inputs) == (site("conv", found_by="child"),)


class _Registered(nn.Module, ABC):
    """A base class that keeps a registry of its subclasses, which must give their name."""

    registry: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.registry[key] = cls


class _Entry(_Registered, key="entry"):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def test_registries_of_classes_take_no_notice_of_the_trace() -> None:
    sites = discover(_Entry(), NetWithSites.inputs)
    assert sites == (site("conv"),)
    assert not sites.sizes_vary
    assert _Registered.registry == {"entry": _Entry}


def raft() -> nn.Module:
    model: nn.Module = torchvision.models.optical_flow.raft_small(weights=None)
    return model


def faster_rcnn() -> nn.Module:
    detection = torchvision.models.detection
    model: nn.Module = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    return model


def count(sites: tuple[ConvSite, ...], found_by: str) -> int:
    return sum(conv_site.found_by == found_by for conv_site in sites)


@pytest.mark.parametrize(
    ("build", "total", "traced", "found_by"),
    [
        ("eca_nfnet_l0", 69, 5, "leaf"),
        ("bat_resnext26ts", 79, 47, "leaf"),
        ("xcit_nano_12_p16_224", 29, 28, "leaf"),
        (raft, 53, 0, "child"),
        (faster_rcnn, 69, 0, "child"),
    ],
)
def test_every_convolution_of_library_models_is_listed_and_called(
    build: str | Callable[[], nn.Module], total: int, traced: int, found_by: str
) -> None:
    if isinstance(build, str):
        with torch.device("meta"):
            model = timm.create_model(build)
    else:
        model = build()
    sites = discover(model, example_inputs(model))
    in_tree = {name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
    assert {conv_site.name for conv_site in sites} == in_tree
    assert len(sites) == total
    assert (count(sites, "fx"), count(sites, found_by)) == (traced, total - traced)
    assert all(conv_site.calls for conv_site in sites)
    assert all("depthwise" in conv_site.skip_reason for conv_site in sites if conv_site.skip_reason)


def test_convolutions_in_the_head_of_a_vgg_are_found_inside_their_leaf() -> None:
    with torch.device("meta"):
        model = timm.create_model("vgg11")
    sites = {conv_site.name: conv_site for conv_site in discover(model)}
    assert len(sites) == 10
    assert sites["pre_logits.fc1"].found_by == sites["pre_logits.fc2"].found_by == "leaf"
    assert sites["pre_logits.fc1"].kernel_size == (7, 7)
    assert sites["pre_logits.fc1"].positions_out == 1


@pytest.mark.parametrize(
    ("choose", "sizes_vary"),
    [
        (lambda x: x[x > 0], True),
        (lambda x: x[0, x[0, :, 0, 0] > 0], True),
        (lambda x: torch.where(x > 0)[0], True),
        (lambda x: x.nonzero(), True),
        (lambda x: torch.masked_select(x, x > 0), True),
        (lambda x: torch.where(x > 0, x, 0), False),
        (lambda x: x[:, torch.tensor([0, 1])], False),
        (lambda x: x.topk(2).values, False),
    ],
)
def test_a_run_shows_whether_sizes_depend_on_values(choose: Callable[[Tensor], Tensor], sizes_vary: bool) -> None:
    class ChoosesSizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return choose(self.conv(x))

    assert discover(ChoosesSizes(), (torch.ones(1, 3, 8, 8),)).sizes_vary is sizes_vary


def test_sites_print_as_a_table_and_take_a_tensor() -> None:
    x = torch.ones(1, 4, 8, 8)
    sites = discover(nn.Sequential(conv()), x)
    assert sites == discover(nn.Sequential(conv()), (x,))
    assert "1 of 1 can be replaced" in str(sites)
