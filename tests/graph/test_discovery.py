"""Discovery: toy networks that carry their expected sites, every reason to stay dense, and models of the zoo."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import batude_fx
from batude_fx.errors import DiscoveryError, SelectionError
from batude_fx.graph.discovery import discover
from batude_fx.graph.example_inputs import example_inputs
from batude_fx.graph.sites import ConvSite


def site(name: str, **changes: Any) -> ConvSite:
    """What `discover` says of `nn.Conv2d(4, 4, 3, padding=1)`, called once on one 4 x 8 x 8 image; changed."""
    known: dict[str, Any] = {
        "kind": "Conv2d", "in_channels": 4, "out_channels": 4, "kernel_size": (3, 3), "groups": 1,
        "transposed": False, "positions_in": 64, "positions_out": 64, "calls": 1, "found_by": "fx", "has_bias": True,
    }  # fmt: skip
    return ConvSite(name=name, **known | changes)


def conv(**changes: Any) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1} | changes)


class Toy(nn.Module):
    """A network that knows its sites; by default it takes one 4 x 8 x 8 image."""

    sites: ClassVar[tuple[ConvSite, ...]]
    inputs: tuple[Tensor, ...] = (torch.ones(1, 4, 8, 8),)


class Plain(Toy):
    """Sizes, groups, strides and dimensions."""

    sites = (
        site("stem", out_channels=6, positions_in=2 * 81, positions_out=2 * 25, has_bias=False),
        site("grouped", in_channels=6, out_channels=8, groups=2, positions_in=50, positions_out=50),
        site("up", kind="ConvTranspose2d", in_channels=8, transposed=True, kernel_size=(2, 2),
             positions_in=50, positions_out=200),
        site("line", kind="Conv1d", kernel_size=(5,), positions_in=200, positions_out=192),
        site("space", kind="Conv3d", out_channels=2, kernel_size=(1, 2, 3), positions_in=192,
             positions_out=2 * 4 * 5 * 2),
    )  # fmt: skip
    inputs = (torch.ones(2, 4, 9, 9),)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(out_channels=6, stride=2, bias=False)
        self.grouped = conv(in_channels=6, out_channels=8, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 4, 5)
        self.space = nn.Conv3d(4, 2, (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.stem(x)))  # (2, 4, 10, 10)
        x = self.line(x.flatten(2))  # (2, 4, 96)
        space: Tensor = self.space(x.view(2, 4, 4, 6, 4))  # (2, 2, 4, 5, 2)
        return space


class Shared(Toy):
    """One module under three names, called under two of them, on two sizes."""

    sites = (site("a", positions_in=64 + 16, positions_out=64 + 16, calls=2, aliases=("b.0", "c")),)

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()
        self.b = nn.Sequential(self.a)
        self.c = self.a

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.a(x), 2)
        shared: Tensor = self.b(x)
        return shared


class Order(Toy):
    """Called in another order than registered; one is never called."""

    sites = (
        site("late"),
        site("early"),
        site("unused", found_by="tree", calls=0, positions_in=0, positions_out=0,
             skip_reason="never called on the example input"),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.early, self.late = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.early(self.late(x))
        return y


@register_notrace_module
class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([conv()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x)
        return x if x.sum() > 0 else -x


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        return F.conv2d(input, 2 * self.weight, self.bias, padding=1)


class Leaves(Toy):
    """A subclass is a node of the graph; what a no-trace module holds is inside a leaf."""

    sites = (
        site("doubled", kind="Doubled",
             skip_reason="no handler for class Doubled; register one with batude_fx.register"),
        site("leaf.inner.0", found_by="leaf"),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.doubled, self.leaf = Doubled(4, 4, 3, padding=1), Untraced()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leaf(self.doubled(x))
        return y


class Branches(nn.Module):
    """Cannot be traced: it looks at values."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if x.sum() > -1e9 else x
        return x


class Untraceable(Toy):
    """Children are traced as deep as needed."""

    sites = (
        site("layers.0", found_by="child"),
        site("layers.1.layers.0", found_by="child"),
        site("layers.2.0", found_by="child"),
        site("layers.2.1.inner.0", found_by="leaf"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(), Branches(conv()), nn.Sequential(conv(), Untraced())])

    def forward(self, x: Tensor) -> Tensor:
        return Branches.forward(self, x)


class Functional(Toy):
    """Convolutions as functions, by position and by keyword, on parameters, buffers and on what is computed."""

    reason = "functional convolution: its weight is no layer's that could be replaced"
    sites = (
        site("kernel", kind="conv2d", out_channels=5, kernel_size=(3, 1), positions_out=48, calls=1, found_by="tree",
             has_bias=False, skip_reason=reason),
        site("conv_transpose2d(5, 2, 2, 2)", kind="conv_transpose2d", in_channels=5, out_channels=2, kernel_size=(2, 2),
             transposed=True, positions_in=48, positions_out=192, found_by="tree", has_bias=False, skip_reason=reason),
        site("blur", kind="conv2d", in_channels=2, out_channels=2, groups=2, kernel_size=(1, 1), positions_in=2 * 192,
             positions_out=2 * 192, calls=2, found_by="tree", has_bias=False, skip_reason=reason),
        site("last", in_channels=2, positions_in=192, positions_out=192),
    )  # fmt: skip
    blur: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(5, 4, 3, 1))
        self.up = nn.Parameter(torch.ones(5, 2, 2, 2))
        self.register_buffer("blur", torch.ones(2, 1, 1, 1))
        self.last = conv(in_channels=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=self.kernel)  # (1, 5, 6, 8)
        x = F.conv_transpose2d(x, weight=2 * self.up, stride=2)  # (1, 2, 12, 16)
        x = F.conv2d(x, self.blur, None, 1, 0, 1, 2)
        x = F.conv2d(x, self.blur, groups=2)
        last: Tensor = self.last(x)
        return last


class WeightsElsewhere(Toy):
    """Weights that another module holds or computes with; asking for shape and dtype is allowed."""

    sites = (
        site("asked"),
        site("used", skip_reason="its weight is also used directly, outside the layer"),
        site("split", skip_reason="its weight is also used directly, outside the layer"),
        site("twin", skip_reason="shares a parameter with 'twin_too'"),
        site("twin_too", skip_reason="shares a parameter with 'twin'"),
        site("tied", skip_reason="shares a parameter with 'owner'"),
        site("biased", skip_reason="shares a parameter with 'biased_too'"),
        site("biased_too", skip_reason="shares a parameter with 'biased'"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.used, self.split, self.twin, self.twin_too, self.tied = (conv() for _ in range(6))
        self.twin_too.weight = self.twin.weight
        self.owner = nn.ParameterList([self.tied.weight])
        self.biased, self.biased_too = conv(), conv()
        self.biased_too.bias = self.biased.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.asked(x.to(self.asked.weight.dtype)) * self.asked.weight.shape[0]
        x = self.used(x) + self.used.weight.mean()
        x = self.split(x) + self.split.weight.chunk(2)[0].mean()
        y: Tensor = self.biased_too(self.biased(self.tied(self.twin_too(self.twin(x)))))
        return y


class Reasons(Toy):
    """Shapes and settings that stay dense; fvcore counts circular 'same' padding, as torch pads beforehand."""

    sites = (
        site("0", groups=4, skip_reason="depthwise, nothing to decompose"),
        site("1", out_channels=8, groups=4, skip_reason="depthwise, nothing to decompose"),
        site("2", in_channels=8, out_channels=1, kernel_size=(1, 1),
             skip_reason="rank 1 already, nothing to decompose"),
        site("3", in_channels=1),
        site("4", skip_reason='fvcore counts no flops for padding="same", so no budget could be checked'),
        site("5", kernel_size=(1, 1),
             skip_reason='fvcore counts no flops for padding="valid", so no budget could be checked'),
        site("6", kind="ParametrizedConv2d",
             skip_reason="parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"),
        site("7", kind="ParametrizedConv2d",
             skip_reason="parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"),
        site("8"),
        site("9", skip_reason="has forward hooks; remove them to replace it"),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        layers = (
            conv(groups=4), conv(out_channels=8, groups=4),
            conv(in_channels=8, out_channels=1, kernel_size=1, padding=0), conv(in_channels=1),
            conv(padding="same"), conv(kernel_size=1, padding="valid"),
            parametrizations.weight_norm(conv()), parametrizations.spectral_norm(conv()),
            conv(padding="same", padding_mode="circular"), conv(),
        )  # fmt: skip
        layers[-1].register_forward_hook(lambda *_: None)
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Masked(Toy):
    """A layer that takes and returns more than one tensor, as partial convolutions do."""

    class Partial(nn.Conv2d):  # noqa: D106 - the class around it says what it is for
        def forward(self, pair: dict[str, Tensor | None]) -> tuple[None, Tensor]:  # type: ignore[override]
            return None, super().forward(cast("Tensor", pair["image"]))

    sites = (
        site("partial", kind="Partial",
             skip_reason="no handler for class Partial; register one with batude_fx.register"),
        site("last"),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.partial, self.last = self.Partial(4, 4, 3, padding=1), conv()

    def forward(self, x: Tensor) -> Tensor:
        _, x = self.partial({"mask": None, "image": x})
        last: Tensor = self.last(x)
        return last


class Unbatched(Toy):
    """Images without a batch axis have their channels first."""

    sites = (site("conv"),)
    inputs = (torch.ones(4, 8, 8),)

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(input=x)
        return y


TOYS = (Plain, Shared, Order, Leaves, Untraceable, Functional, WeightsElsewhere, Reasons, Masked, Unbatched)


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_toys_have_the_sites_they_carry(toy: type[Toy], training: bool) -> None:
    model = toy().train(training)
    assert discover(model, model.inputs) == toy.sites


def test_linear_layers_are_listed_on_request() -> None:
    model = nn.Sequential(conv(), nn.Flatten(2), nn.Linear(64, 3, bias=False))
    linear = {"kind": "Linear", "in_channels": 64, "out_channels": 3, "kernel_size": (), "has_bias": False}
    assert discover(model, Toy.inputs, layers="conv+linear") == (
        site("0"),
        site("2", **linear, positions_in=4, positions_out=4),
    )


def test_attention_reads_a_weight_without_calling_its_layer() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    sites = {one.name: one for one in discover(model, (torch.ones(5, 8),), layers="conv+linear")}
    assert sites.keys() == {"0.self_attn.out_proj", "0.linear1", "0.linear2"}
    assert all("weight" in str(one.skip_reason) for one in sites.values())


def test_what_is_compressed_already_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    x = torch.ones(1, 3, 8, 8)
    once = batude_fx.compress(net, 0.5, calibration=None, example_inputs=x)
    reasons = [one.skip_reason for one in discover(once, (x,)) if one.name.startswith("1.")]
    assert reasons
    assert set(reasons) == {"is part of a Tucker module already"}


def test_the_model_itself_cannot_be_swapped() -> None:
    (found,) = discover(conv(), Toy.inputs)
    assert found == site("", skip_reason="is the model itself; wrap it in nn.Sequential")


class Selectable(Toy):
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
    sites = discover(Selectable(), Toy.inputs, include=include, exclude=exclude)
    assert [one.name for one in sites] == ["stem", "layer1.0", "layer1.1", "layer2.0"]
    assert [one.skip_reason for one in sites] == reasons


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error_with_suggestions(argument: str) -> None:
    with pytest.raises(SelectionError, match=r"'layer1\.O' matches none of the 4 sites.*layer1\.0"):
        discover(Selectable(), Toy.inputs, **{argument: ("stem", "layer1.O")})


def test_unknown_layers_are_an_error() -> None:
    with pytest.raises(SelectionError, match="'linear' is not known; use one of 'conv', 'conv\\+linear'"):
        discover(Selectable(), Toy.inputs, layers="linear")


@pytest.mark.parametrize(
    ("model", "layers", "inputs", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "conv", None, 'no convolution among its 2 .* Use layers="conv\\+linear"'),
        (nn.Sequential(nn.ReLU()), "conv", Toy.inputs, "no convolution among its 2 modules. Pass the network"),
        (nn.Sequential(nn.ReLU()), "conv+linear", Toy.inputs, "no convolution or linear layer"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "conv", Toy.inputs, "'0.weight' is lazy.*run it once"),
        (nn.Sequential(conv()), "conv", None, "no timm or torchvision model.*Pass example_inputs="),
    ],
)  # fmt: skip
def test_models_without_anything_to_find(model: nn.Module, layers: str, inputs: Any, message: str) -> None:
    with pytest.raises(DiscoveryError, match=message):
        discover(model, inputs, layers=layers)


class Keeper(nn.Module):
    """Keeps things in attributes, in a dict and in batch-norm statistics, and trains only in part."""

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
    """What a module is made of, by identity where it can be shared."""
    state = [(name, value.clone().tolist()) for name, value in model.state_dict().items()]
    attributes = [sorted((k, id(v)) for k, v in vars(module).items()) for module in model.modules()]
    hooks = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    return [state, attributes, hooks, [list(vars(module).get("cache", ())) for module in model.modules()]]


def test_the_model_is_given_back_as_it_was() -> None:
    model = Keeper()
    before, generator = everything(model), torch.get_rng_state()
    discover(model, Toy.inputs)
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_users_hooks_and_caches_see_no_proxies() -> None:
    model = timm.create_model("pit_ti_224", features_only=True)  # keeps outputs by the device of the input
    seen: list[object] = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda _module, _inputs, output: seen.append(type(output)))
    discover(model, torch.zeros(1, 3, 224, 224))
    assert seen == [Tensor]
    copy.deepcopy(model)


def test_a_model_that_does_not_run_is_given_back_too() -> None:
    model = Keeper()
    before = everything(model)
    message = r"Keeper does not run on the example input of shape \(1, 5, 8, 8\): RuntimeError: .*Pass example_inputs="
    with pytest.raises(DiscoveryError, match=message) as caught:
        discover(model, (torch.ones(1, 5, 8, 8),))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert everything(model) == before


def test_tracing_has_no_say_in_whether_a_model_can_be_discovered() -> None:
    class Hostile(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> Tensor:
            if type(x) is not Tensor:
                raise KeyError("no proxies here")
            y: Tensor = self.conv(x)
            return y

    assert discover(Hostile(), Toy.inputs) == (site("conv", found_by="child"),)


def raft() -> nn.Module:
    model: nn.Module = torchvision.models.optical_flow.raft_small(weights=None)
    return model


def faster_rcnn() -> nn.Module:
    detection = torchvision.models.detection
    model: nn.Module = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    return model


def count(sites: tuple[ConvSite, ...], found_by: str) -> int:
    return sum(one.found_by == found_by for one in sites)


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
def test_every_convolution_of_the_zoo_is_seen_and_called(
    build: str | Callable[[], nn.Module], total: int, traced: int, found_by: str
) -> None:
    if isinstance(build, str):
        with torch.device("meta"):
            model = timm.create_model(build)
    else:
        model = build()
    sites = discover(model, example_inputs(model))
    in_tree = {name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
    assert {one.name for one in sites} == in_tree
    assert len(sites) == total
    assert (count(sites, "fx"), count(sites, found_by)) == (traced, total - traced)
    assert all(one.calls for one in sites)
    assert {one.skip_reason for one in sites if one.skip_reason and "depthwise" not in one.skip_reason} == set()


def test_convolutions_in_the_head_of_a_vgg_are_found_inside_their_leaf() -> None:
    with torch.device("meta"):
        model = timm.create_model("vgg11")
    sites = {one.name: one for one in discover(model)}
    assert len(sites) == 10
    assert sites["pre_logits.fc1"].found_by == sites["pre_logits.fc2"].found_by == "leaf"
    assert sites["pre_logits.fc1"].kernel_size == (7, 7)
    assert sites["pre_logits.fc1"].positions_out == 1


@pytest.mark.parametrize(
    ("choose", "selects"),
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
def test_a_run_tells_whether_values_decide_sizes(choose: Callable[[Tensor], Tensor], selects: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return choose(self.conv(x))

    assert discover(Net(), (torch.ones(1, 3, 8, 8),)).sizes_vary is selects


def test_sites_print_as_a_table_and_take_a_tensor() -> None:
    x = torch.ones(1, 4, 8, 8)
    sites = discover(nn.Sequential(conv()), x)
    assert sites == discover(nn.Sequential(conv()), (x,))
    assert "1 of 1 can be replaced" in str(sites)
