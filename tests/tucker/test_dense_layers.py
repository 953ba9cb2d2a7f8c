"""Dense layers: which ones have a handler, and why the others stay as they are."""

import re
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from batude_fx.errors import UnsupportedError
from batude_fx.tucker.dense_layers import Handler, canonical_weight, register, skip_reason
from batude_fx.tucker.modules import build
from batude_fx.tucker.ranks import Ranks
from tests.tucker.low_rank_layers import Case, assert_same_function, set_low_rank_weight


class Halved(nn.Conv2d):
    """A class as a user may write it, which convolves with half of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self._conv_forward(x, self.weight / 2, self.bias))


def test_a_class_of_the_user_is_unknown_until_registered() -> None:
    layer = Halved(4, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64)
    assert skip_reason(layer) == "no handler for class Halved; register one with batude_fx.register"
    with pytest.raises(UnsupportedError, match="no handler for class Halved"):
        build(layer, Ranks(1, 1))

    class Registered(Halved):
        pass

    class Child(Registered):
        pass

    register(Registered, Handler(weight=lambda module: module.weight.div(2)))
    layer = Registered(4, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64)
    set_low_rank_weight(layer, Ranks(2, 2), seed=0)
    assert_same_function(Case(layer, Ranks(2, 2), torch.randn(2, 4, 5, 6, dtype=torch.float64)))
    assert "no handler for class Child" in str(skip_reason(Child(4, 6, 3)))


def test_only_convolutions_and_linear_layers_can_be_registered() -> None:
    with pytest.raises(UnsupportedError, match=r"ReLU cannot be registered: it derives from none of Conv1d, .*Linear"):
        register(nn.ReLU, Handler())


def with_forward_hook() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_state_dict_hook() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    layer.register_state_dict_post_hook(lambda *_: None)  # type: ignore[no-untyped-call]
    return layer


def with_other_forward() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    layer.__dict__["forward"] = lambda x: x
    return layer


def pruned() -> nn.Module:
    return cast("nn.Module", prune.l1_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.5))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nn.ReLU, "no handler for class ReLU"),
        (lambda: nn.LazyConv2d(4, 3), "no handler for class LazyConv2d"),
        (with_forward_hook, "has forward hooks; remove them"),
        (with_state_dict_hook, "has state dict hooks; remove them"),
        (with_other_forward, "forward method was replaced"),
        (pruned, "has forward pre hooks"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), "remove_parametrizations"),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, "read by MultiheadAttention"),
        (lambda: nn.ConvTranspose2d(4, 6, 1, stride=2), "transposed 1x1 kernel"),
        (lambda: nn.ConvTranspose1d(4, 6, 1, padding=1), "transposed 1x1 kernel"),
        (lambda: nn.Conv2d(4, 6, 3, dtype=torch.complex64), r"dtype torch\.complex64"),
    ],
)
def test_layers_that_cannot_be_replaced_exactly_have_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    layer = make()
    text = skip_reason(layer)
    assert text is not None
    assert re.search(reason, text)
    with pytest.raises(UnsupportedError, match=reason):
        canonical_weight(layer)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3), nn.ConvTranspose1d(4, 6, 1), nn.Linear(4, 6), nn.Conv3d(1, 1, 1)]
)
def test_plain_layers_have_no_reason(layer: nn.Module) -> None:
    assert skip_reason(layer) is None
