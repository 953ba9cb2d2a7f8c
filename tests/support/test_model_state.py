"""A model is as it was after a block in which it ran, whatever it keeps things in."""

import copy
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batude_fx.support.model_state import eval_and_restore


class _Frozen(dict[str, Any]):
    """A dict as diffusers' FrozenDict is one: it refuses to be changed."""

    def update(self, *_: object, **__: object) -> None:
        raise TypeError("frozen")

    clear = pop = update


class _Keeps(nn.Module):
    """Keeps its last output wherever a model can keep something."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.config = _Frozen(width=4)
        self.listed: list[Any] = [torch.zeros(1)]
        self.queue: deque[Any] = deque([torch.zeros(1)])
        self.named: dict[str, Any] = {"inner": {"last": torch.zeros(1)}}
        self.ordered = OrderedDict(a=torch.zeros(1))
        self.pair = (SimpleNamespace(last=torch.zeros(1)), {torch.float32})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        self.listed[0] = y
        self.queue.append(y)
        self.named["inner"]["last"] = y
        self.named["new"] = y
        self.ordered.move_to_end("a")
        self.ordered["b"] = y
        self.pair[0].last = y
        self.pair[1].add(y.dtype if y.dtype != torch.float32 else torch.float64)
        self.last = y
        return y


def _kept(model: _Keeps) -> list[object]:
    return [
        list(model.listed), list(model.queue), dict(model.named["inner"]), list(model.named), list(model.ordered),
        model.pair[0].last, set(model.pair[1]), dict(model.config), sorted(vars(model)),
    ]  # fmt: skip


def test_what_a_model_keeps_is_what_it_kept_before() -> None:
    model = _Keeps().train()
    before = _kept(model)
    with eval_and_restore(model):
        model(torch.zeros(1, 3, 2, 2))
    assert _kept(model) == before
    assert model.training
    copy.deepcopy(model)  # torch refuses to copy tensors that have a graph


def test_the_order_of_children_stays_when_one_is_taken_out_for_a_while() -> None:
    model = nn.Sequential(OrderedDict(a=nn.ReLU(), b=nn.Tanh()))
    first = model.a
    with eval_and_restore(model):
        del model.a
    assert list(model.children()) == [first, model.b]


def test_one_failure_does_not_stop_the_rest() -> None:
    class Stubborn(list[Any]):
        def __len__(self) -> int:
            raise RuntimeError("no length")

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    vars(model[0])["kept"] = Stubborn()
    with pytest.raises(RuntimeError, match="no length"), eval_and_restore(model):
        model[1].register_forward_hook(lambda *_: None)
    assert model.training
    assert model[1].training
    assert not model[1]._forward_hooks
