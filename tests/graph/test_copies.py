"""A copy of a model computes with its own parts, or is refused: by what can be seen in it, and by a run."""

import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import batude_fx
from batude_fx import UnsupportedError
from batude_fx.graph.shared_parts import refuse_shared_parts
from batude_fx.graph.surgery import copy_model
from batude_fx.support.inputs import Inputs
from tests.toy_networks import TwoConvolutions

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class _Notes(nn.Module):
    """Reads in its forward what a hook of a part has written into its dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
        self.notes: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.conv(x)
        y: Tensor = self.head(self.notes["last"])
        return y


def _closes_over_the_model() -> nn.Module:
    model = _Notes()
    model.conv.register_forward_hook(lambda _module, _args, output: model.notes.update(last=output))
    return model


def _closes_over_a_dict_of_the_model() -> nn.Module:
    model = _Notes()
    notes = model.notes
    model.conv.register_forward_hook(lambda _module, _args, output: notes.update(last=output))
    return model


def _with_forward(make: Callable[[nn.Module, Any], Any]) -> nn.Module:
    model = TwoConvolutions()
    vars(model.a)["forward"] = make(model.a, model.a.forward)
    return model


def _bound_by_methodtype() -> nn.Module:
    return _with_forward(lambda layer, forward: types.MethodType(lambda _self, x: forward(x), layer))


def _by_default_argument() -> nn.Module:
    return _with_forward(lambda _layer, forward: lambda x, forward=forward: forward(x))


def _by_partial() -> nn.Module:
    def run(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return forward(x)

    return _with_forward(lambda _layer, forward: partial(run, lambda x: 2 * forward(x)))


def _by_weak_reference() -> nn.Module:
    model = TwoConvolutions()
    vars(model)["back"] = weakref.ref(model.a)
    return model


@pytest.mark.parametrize(
    "build",
    [
        _closes_over_the_model,
        _closes_over_a_dict_of_the_model,
        _bound_by_methodtype,
        _by_default_argument,
        _by_partial,
        _by_weak_reference,
    ],
)
def test_functions_that_lead_back_to_the_original_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedError, match="a copy would go on to use that of the original"):
        copy_model(build())


def test_bound_methods_and_partials_of_them_are_copied_with_the_model() -> None:
    model = TwoConvolutions()
    vars(model).update(method=model.a.forward, partial=partial(model.b.forward))
    copied = copy_model(model)
    assert copied.method.__self__ is copied.a
    assert copied.partial.func.__self__ is copied.b


def test_modules_that_rebuild_their_functions_when_copied_pass() -> None:
    class Metric(nn.Module):
        """Wraps its own method, and leaves the wrapper out of its state, as torchmetrics' do."""

        def __init__(self) -> None:
            super().__init__()
            self._wrap()

        def _wrap(self) -> None:
            update = self.update
            self.wrapped = lambda times=1: [update()] * times

        def update(self) -> "Metric":
            return self

        def __getstate__(self) -> dict[str, Any]:
            return {key: value for key, value in vars(self).items() if key != "wrapped"}

        def __setstate__(self, state: dict[str, Any]) -> None:
            vars(self).update(state)
            self._wrap()

    model = TwoConvolutions()
    model.metric = Metric()
    copied = batude_fx.compress(model, 0.6, example_inputs=IMAGE, calibration=None)
    assert copied.metric.wrapped() == [copied.metric]


def test_a_run_shows_what_cannot_be_seen() -> None:
    class Indirect(TwoConvolutions):
        """Calls its second layer through a list that a function closes over."""

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.a(x))
            return y

    model = Indirect()
    parts = [model.b]

    class Calls:
        def __call__(self, x: Tensor) -> Tensor:
            y: Tensor = parts[0](x)
            return y

    vars(model)["second"] = Calls()
    with pytest.raises(UnsupportedError, match=r"goes on to use 'b\.bias' of the original"):
        refuse_shared_parts(copy_model(model), model, Inputs((IMAGE,)))


def test_functions_may_close_over_settings_of_the_model() -> None:
    model = TwoConvolutions()
    settings = types.SimpleNamespace(scale=2.0, widths=[8, 16], norm="batch")
    vars(model).update(settings=settings, scaled=lambda x: x * settings.scale)
    assert copy_model(model).scaled(3) == 6


def test_functions_may_not_close_over_an_object_that_waits_for_a_value() -> None:
    model = TwoConvolutions()
    cache = types.SimpleNamespace(value=None)
    vars(model).update(cache=cache, note=lambda x: vars(cache).update(value=x))
    with pytest.raises(UnsupportedError, match="closes over an object of class SimpleNamespace"):
        copy_model(model)


def test_functions_may_not_close_over_an_object_that_leads_to_a_module() -> None:
    model = TwoConvolutions()
    settings = types.SimpleNamespace(parts=[{"first": model.a}])
    vars(model).update(settings=settings, run=lambda x: settings.parts[0]["first"](x) + 1)
    with pytest.raises(UnsupportedError, match="closes over an object of class SimpleNamespace of the TwoConv"):
        copy_model(model)


def test_activations_of_the_run_are_not_kept() -> None:
    class Counts(TwoConvolutions):
        """Counts how many activations are alive in the middle of a forward pass."""

        def forward(self, x: Tensor) -> Tensor:
            first = torch.ones(1) + x.mean()
            gone = weakref.ref(first)
            del first
            assert gone() is None, "it is still alive"
            y: Tensor = super().forward(x)
            return y

    model = Counts()
    refuse_shared_parts(copy_model(model), model, Inputs((IMAGE,)))


def test_a_parameter_of_the_original_is_found_too() -> None:
    model = TwoConvolutions()
    weight = [model.a.weight]

    class Scaled(TwoConvolutions):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) * weight[0].mean()
            return y

    model.__class__ = Scaled
    with pytest.raises(UnsupportedError, match=r"goes on to use 'a\.weight'"):
        refuse_shared_parts(copy_model(model), model, Inputs((IMAGE,)))


def test_a_compiled_part_is_named() -> None:
    compiled = cast("nn.Module", torch.compile(nn.Conv2d(16, 16, 3), backend="eager"))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), compiled)
    with pytest.raises(UnsupportedError, match=r"'1' is of class OptimizedModule.*`_orig_mod` in its place"):
        batude_fx.compress(model, 0.6, example_inputs=IMAGE, calibration=None)
