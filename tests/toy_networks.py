"""The small networks of the tests: first those that are compressed, then those that know which sites they have."""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from batude_fx.graph.sites import ConvSite


def site_of(name: str, layer: nn.Module, positions: int = 49) -> ConvSite:
    """Return the site of a convolution or linear layer that is called once, with this many positions in and out."""
    is_linear = isinstance(layer, nn.Linear)
    return ConvSite(
        name, type(layer).__name__,
        layer.in_features if is_linear else layer.in_channels, layer.out_features if is_linear else layer.out_channels,
        () if is_linear else layer.kernel_size, 1 if is_linear else layer.groups,
        transposed=False, positions_in=positions, positions_out=positions, calls=1, found_by="fx",
    )  # fmt: skip


def small_net() -> nn.Sequential:
    """Return two convolutions, the second one grouped, and a classifier: small enough to keep all activations."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class VariedNet(nn.Module):
    """Strides, groups, 1x1, depthwise, a residual, batch-norm, a shared layer and one that has no bias.

    Its sites are stem, mix, depthwise (never replaced) and shared; it takes images of 3 channels and any size.
    """

    def __init__(self, width: int = 16, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, 2 * width, 3, stride=stride, padding=1, groups=groups)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.shared = nn.Conv2d(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.mix(x))
        x = x + self.depthwise(self.shared(torch.relu(self.shared(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def varied_net(**arguments: int) -> VariedNet:
    """Return a `VariedNet` that has the same weights at every call."""
    torch.manual_seed(0)
    return VariedNet(**arguments)


class Noisy(VariedNet):
    """A `VariedNet` that draws from the global random generator in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn_like(x))


class TwoConvolutions(nn.Module):
    """Two convolutions that can be replaced, `a` and `b`, with a batch-norm between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.n = nn.BatchNorm2d(32)
        self.b = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.n(self.a(x)).relu()).mean((2, 3))
        return y


class InPlace(TwoConvolutions):
    """Normalizes the images that it is given in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.3).div_(0.37))


class OutOfPlace(TwoConvolutions):
    """Computes what `InPlace` does and leaves its images as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.3) / 0.37)


class Residual(nn.Sequential):
    """Adds its input to the output of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return out


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A stem that can be compressed, then convolutions of all kinds, with and without bias, norms and residuals."""
    torch.manual_seed(0)
    channels, bias = 16, st.booleans()
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=draw(bias))]
    for kind in draw(st.lists(st.sampled_from(["full", "pointwise", "depthwise", "residual"]), max_size=3)):
        width, stride = channels, draw(st.integers(1, 2))
        if kind == "depthwise":
            layer: nn.Module = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=draw(bias))
        elif kind == "residual":
            layer = Residual(nn.Conv2d(channels, channels, 3, padding=1, bias=draw(bias)), nn.ReLU())
        else:
            width, extent = draw(st.sampled_from([8, 24, 40])), 1 if kind == "pointwise" else draw(st.integers(2, 3))
            groups, padding = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
            layer = nn.Conv2d(channels, width, extent, stride, padding, groups=groups, bias=draw(bias))
        layers += [layer, nn.BatchNorm2d(width)] if draw(bias) else [layer, nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Choosy(nn.Module):
    """Computes its head for the positions with small features only, as a detector does for the boxes it chooses."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, head)
        self.most = 0.0

    def forward(self, x: Tensor) -> Tensor:
        features = self.look(x)  # (1, 64, H, W)
        strength = features.abs().mean(1)  # (1, H, W)
        chosen: Tensor = self.head(features.movedim(1, -1)[strength < self.most])
        return chosen


def choosy_net(head: int) -> tuple[Choosy, Tensor]:
    """Return a network that computes its head for a fifth of the positions of the image that comes with it."""
    torch.manual_seed(0)
    model, x = Choosy(head), torch.randn(1, 32, 16, 16)
    with torch.no_grad():
        model.most = float(model.look(x).abs().mean(1).quantile(0.2))
    return model, x


class OwnNet(nn.Module):
    """A network of no library, whose second convolution has two names and is called under both."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.again = self.second

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.second(self.first(x)))
        return out


class ConstantClassifier(nn.Module):
    """Gives every image the same class."""

    def __init__(self, favourite: int, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("answer", torch.eye(classes)[favourite])
        self.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = 0 * self.conv(x).mean((1, 2, 3))[:, None] + self.answer  # (N, classes)
        return scores


def site(name: str, **changes: Any) -> ConvSite:
    """Return what `discover` says of `conv()` called once on one 4 x 8 x 8 image, with these fields changed."""
    fields: dict[str, Any] = {
        "kind": "Conv2d", "in_channels": 4, "out_channels": 4, "kernel_size": (3, 3), "groups": 1,
        "transposed": False, "positions_in": 64, "positions_out": 64, "calls": 1, "found_by": "fx", "has_bias": True,
    }  # fmt: skip
    return ConvSite(name=name, **fields | changes)


def conv(**changes: Any) -> nn.Conv2d:
    """Return a 3 x 3 convolution from 4 to 4 channels, with these arguments changed."""
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1} | changes)


class NetWithSites(nn.Module):
    """A network that says which sites `discover` is to find in it; by default it takes one 4 x 8 x 8 image."""

    sites: ClassVar[tuple[ConvSite, ...]]
    inputs: tuple[Tensor, ...] = (torch.ones(1, 4, 8, 8),)


class Plain(NetWithSites):
    """Convolutions of several sizes, groups, strides and dimensions."""

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


class Shared(NetWithSites):
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


class Order(NetWithSites):
    """Its convolutions are called in another order than registered, and one is never called."""

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
    """A module of timm's no-trace list: a leaf of the graph, with a convolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([conv()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x)
        return x if x.sum() > 0 else -x


class Doubled(nn.Conv2d):
    """A convolution of a class without a handler."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        return F.conv2d(input, 2 * self.weight, self.bias, padding=1)


class Leaves(NetWithSites):
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
    """Cannot be traced, as values decide which layers run."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if x.sum() > -1e9 else x
        return x


class Untraceable(NetWithSites):
    """Cannot be traced, so that its children are, as deep as needed."""

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


class Functional(NetWithSites):
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


class WeightsElsewhere(NetWithSites):
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


class Reasons(NetWithSites):
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


class Masked(NetWithSites):
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


class Unbatched(NetWithSites):
    """Images without a batch axis have their channels first."""

    sites = (site("conv"),)
    inputs = (torch.ones(4, 8, 8),)

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(input=x)
        return y


NETS_WITH_SITES = (Plain, Shared, Order, Leaves, Untraceable, Functional, WeightsElsewhere, Reasons, Masked, Unbatched)
