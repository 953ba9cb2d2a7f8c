"""Surgery: the copy has the replacements under all names and is otherwise equal; the input model does not change."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import batude_fx
from batude_fx.errors import BatudeError, SelectionError, UnsupportedError
from batude_fx.graph.surgery import build_skeleton, replace_modules
from batude_fx.tucker.modules import TuckerModule, build
from batude_fx.tucker.ranks import Ranks


class Scale(nn.Module):
    """A layer that is identified by the value of its parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class ManyNames(nn.Module):
    """Two names for one convolution, a plain reference to it, a tied weight and a hook that is a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.again: nn.Module = self.body[0]
        self.plain = [self.again]
        self.tied = nn.Conv2d(4, 4, 3)
        self.tied.weight = cast("nn.Conv2d", self.again).weight
        self.calls: list[int] = []
        self.body.register_forward_hook(self.count)
        self.body[1].eval()

    def count(self, *_: object) -> None:
        self.calls.append(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.first(x))
        return cast("Tensor", self.plain[0](self.tied(self.again(x))))


def snapshot(model: nn.Module) -> list[object]:
    """Everything that must not change: modules and tensors by identity, their bytes, flags and hooks."""
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, id(module), module.training, list(module._forward_hooks.values())) for name, module in modules],
        [(name, id(tensor), tensor.data_ptr(), tensor.detach().numpy().tobytes()) for name, tensor in tensors],
        [(name, tensor.requires_grad, tensor._version) for name, tensor in tensors],
    ]


@st.composite
def trees(draw: st.DrawFn) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A tree of layers, some of them shared, and replacements for some of the layers under any of their names."""
    pool: list[nn.Module] = [Scale(1.0 + index) for index in range(draw(st.integers(1, 4)))]

    def block(depth: int) -> nn.Module:
        parts = [
            block(depth + 1) if depth < 2 and draw(st.booleans()) else draw(st.sampled_from(pool))
            for _ in range(draw(st.integers(1, 3)))
        ]
        module = nn.Sequential(OrderedDict((f"part{index}", part) for index, part in enumerate(parts)))
        return module.train(draw(st.booleans()))

    model = block(0)
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Scale):
            names.setdefault(id(module), []).append(name)
    replaced = draw(st.lists(st.sampled_from(list(names)), unique=True))
    return model, {draw(st.sampled_from(names[key])): Scale(-10.0 - i).eval() for i, key in enumerate(replaced)}


@given(trees())
@settings(max_examples=100, deadline=None)
def test_the_copy_equals_one_edited_by_hand(tree: tuple[nn.Module, dict[str, nn.Module]]) -> None:
    model, modules = tree
    before = snapshot(model)
    small = replace_modules(model, modules)
    assert snapshot(model) == before

    by_hand = copy.deepcopy(model)
    old = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for name, module in old.items():
        new = next((modules[other] for other in modules if old[other] is module), None)
        if new is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(by_hand.get_submodule(parent), attribute, new)
    assert str(small) == str(by_hand)
    assert [(name, m.training) for name, m in small.named_modules()] == [
        (name, m.training) for name, m in by_hand.named_modules()
    ]
    assert list(small.state_dict()) == list(by_hand.state_dict())
    assert all(torch.equal(value, by_hand.state_dict()[key]) for key, value in small.state_dict().items())
    assert torch.equal(small(torch.ones(2)), by_hand(torch.ones(2)))
    assert all(small.get_submodule(name) is module for name, module in modules.items())


def test_every_reference_leads_to_the_replacement_and_the_rest_is_kept() -> None:
    model = ManyNames()
    before = snapshot(model)
    new = nn.Conv2d(4, 4, 3)
    small = replace_modules(model, {"again": new})
    assert type(small) is ManyNames
    assert small.again is small.body[0] is small.plain[0] is new
    assert torch.equal(small.tied.weight, model.tied.weight)  # tied to a weight that is gone: it keeps its own copy
    assert [(name, m.training) for name, m in small.named_modules()] == [
        (name, m.training) for name, m in model.named_modules()
    ]
    small(torch.randn(1, 3, 16, 16))
    assert small.calls == [1]  # the hook is bound to the copy, not to the model
    assert model.calls == []
    assert snapshot(model) == before


def test_model_and_copy_share_no_memory_and_ties_stay_tied() -> None:
    model = ManyNames()
    small = replace_modules(model, {"first": nn.Conv2d(3, 4, 3)})
    assert small.tied.weight is small.body[0].weight
    ours, theirs = ({tensor.data_ptr() for tensor in net.state_dict().values()} for net in (small, model))
    assert not ours & theirs


def test_replaced_modules_are_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    copied: list[int] = []
    original: Callable[..., nn.Parameter] = nn.Parameter.__deepcopy__

    def spy(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
        copied.append(id(parameter))
        return original(parameter, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", spy)
    replace_modules(model, {"0": nn.Identity()})
    assert sorted(copied) == sorted(id(parameter) for parameter in model[1].parameters())


def test_a_graph_module_can_be_operated_on() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    small = replace_modules(traced, {"0": Scale(2.0)})
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(small(x), (2 * x).relu())


def test_a_graph_module_stays_in_eval_mode() -> None:
    model = create_feature_extractor(torchvision.models.resnet18().eval(), ["layer1"]).eval()
    replaced = replace_modules(model, {"layer1.0.conv1": nn.Conv2d(64, 64, 3, padding=1)})
    assert not any(module.training for module in replaced.modules())


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_conv_128s"])
@torch.no_grad()
def test_layers_that_timm_would_fuse_without_their_bias_stay_as_they_are(name: str) -> None:
    dense = timm.create_model(name).eval()
    fused = timm.utils.reparameterize_model(dense)
    image = torch.randn(1, 3, 224, 224)
    for model in (dense, fused):
        small = batude_fx.compress(model, 0.9, calibration=None)
        for copied in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), batude_fx.fold(small)):  # noqa: S301
            expected = copied(image)
            again = timm.utils.reparameterize_model(copied)
            assert sum(isinstance(part, TuckerModule) for part in again.modules()) > 0
            torch.testing.assert_close(again(image), expected)


def test_the_root_itself_can_be_replaced() -> None:
    new = nn.Identity()
    assert replace_modules(cast("nn.Module", nn.Conv2d(3, 4, 3)), {"": new}) is new


class Stubborn(nn.Module):
    """A module whose `__deepcopy__` ignores the memo."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stubborn":
        return Stubborn()


class Locked(nn.Conv2d):
    """A module that cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Locked":
        raise TypeError("cannot pickle '_thread.lock' object")


def with_non_leaf() -> nn.Module:
    model = ManyNames()
    model.computed = model.first.weight * 2
    return model


def test_a_tensor_with_a_graph_is_copied_without_it() -> None:
    model = with_non_leaf()
    copied = replace_modules(model, {"first": nn.Identity()})
    assert torch.equal(copied.computed, model.computed)
    assert copied.computed.grad_fn is None
    assert model.computed.grad_fn is not None


@pytest.mark.parametrize(
    ("model", "modules", "error", "message"),
    [
        (ManyNames(), {"body.7": nn.Identity()}, SelectionError, r"ManyNames has no submodule 'body\.7'"),
        (ManyNames(), {"again": nn.Identity(), "body.0": nn.ReLU()}, SelectionError, r"'body\.0' is another name"),
        (ManyNames(), {"body": nn.Identity(), "body.1": nn.ReLU()}, BatudeError, r"replacement at 'body\.1'"),
        (nn.Sequential(Stubborn()), {"0.conv": nn.Identity()}, BatudeError, r"'0\.conv'.*__deepcopy__"),
        (nn.Sequential(nn.ReLU(), Locked(3, 4, 3)), {"0": nn.Identity()}, BatudeError, r"cannot be copied: .*lock"),
    ],
)
def test_errors_say_what_to_do_and_leave_the_model_alone(
    model: nn.Module, modules: dict[str, nn.Module], error: type[BatudeError], message: str
) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message):
        replace_modules(model, modules)
    assert snapshot(model) == before


def test_the_same_replacement_may_be_given_under_two_names() -> None:
    new = nn.Conv2d(4, 4, 3)
    assert replace_modules(ManyNames(), {"again": new, "body.0": new}).plain[0] is new


def test_a_timm_model_stays_a_timm_model() -> None:
    model = timm.create_model("resnet10t", num_classes=7).eval()
    model.get_submodule("layer1").train()
    before = snapshot(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and "layer" in name]
    small = build_skeleton(model, {name: Ranks(8, 8) for name in names})
    assert snapshot(model) == before
    assert type(small) is type(model)
    assert all(isinstance(small.get_submodule(name), TuckerModule) for name in names)
    # The parts take over the flag of their layer, wherever the model is in training.
    assert all(part.training == ("layer1" in name) for name, part in small.named_modules() if name)
    network: Any = small
    assert network.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 512, 2, 2)
    network.reset_classifier(3)
    assert small.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert model.num_classes == 7


def test_hooks_of_a_timm_feature_network_work_in_the_copy() -> None:
    model = timm.create_model("resnet10t", features_only=True, feature_cls="hook").eval()
    x = torch.randn(1, 3, 64, 64)
    name = next(name for name, _ in model.named_modules() if name.endswith("layer4.0.downsample.1"))
    small = replace_modules(model, {name: copy.deepcopy(model.get_submodule(name))})
    assert all(torch.equal(a, b) for a, b in zip(small(x), model(x), strict=True))
    with torch.no_grad():
        cast("nn.Conv2d", small.get_submodule(name)).weight.zero_()
    equal = [torch.equal(a, b) for a, b in zip(small(x), model(x), strict=True)]
    assert equal == [True, True, True, True, False]


def test_a_skeleton_takes_the_state_dict_of_the_compressed_model() -> None:
    model = ManyNames()
    ranks = {"first": Ranks(2, 3), "body.0": Ranks(2, 2)}
    small = replace_modules(model, {name: build(model.get_submodule(name), r) for name, r in ranks.items()})
    for parameter in small.parameters():
        nn.init.normal_(parameter)
    skeleton = build_skeleton(ManyNames(), ranks)
    skeleton.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(skeleton(x), small(x))


def test_a_skeleton_can_have_more_biases_than_the_dense_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    skeleton = build_skeleton(model, {"0": Ranks(2, 3), "1": Ranks(2, 2)}, biased=["1"])
    assert [name for name in skeleton.state_dict() if name.endswith("bias")] == ["1.factor_out.bias"]


@pytest.mark.parametrize(
    ("ranks", "error"), [({"nowhere": Ranks(1, 1)}, SelectionError), ({"body.1": Ranks(1, 1)}, UnsupportedError)]
)
def test_a_skeleton_refuses_what_is_not_there(ranks: dict[str, Ranks], error: type[BatudeError]) -> None:
    with pytest.raises(error):
        build_skeleton(ManyNames(), ranks)
