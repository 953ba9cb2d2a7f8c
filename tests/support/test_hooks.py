"""Hooks: what they see, what they replace, and that none is left behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batude_fx.support.hooks import observe_calls, on_gradient


class ScaledBy(nn.Module):
    """Multiplies by a factor, which is a keyword argument."""

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Tensor:
        return factor * x


class CallsTwice(nn.Module):
    """Calls one module twice and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = ScaledBy(), ScaledBy()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.once(self.twice(self.twice(x, factor=2.0), factor=2.0))
        return y


def _hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_every_call_is_seen_with_its_key_arguments_and_output() -> None:
    net, before, after = CallsTwice(), [], []
    x = torch.tensor(3.0)

    def note_input(key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before.append((key, args[0].item(), kwargs))

    def note_output(key: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        after.append((key, args[0].item(), kwargs, output.item()))

    with observe_calls({"twice": net.twice, "once": net.once}, before=note_input, after=note_output):
        assert net(x) == 12
    assert before == [("twice", 3, {"factor": 2.0}), ("twice", 6, {"factor": 2.0}), ("once", 12, {})]
    assert after == [(*call, output) for call, output in zip(before, (6, 12, 12), strict=True)]


def test_hooks_are_there_during_the_block_only() -> None:
    net = CallsTwice()
    with observe_calls({0: net.twice}, before=lambda *_: None, after=lambda *_: None):
        assert _hook_count(net) == 2
    assert _hook_count(net) == 0


def test_a_returned_value_replaces_the_output() -> None:
    net = CallsTwice()
    with observe_calls({0: net.twice}, after=lambda _key, _args, _kwargs, output: output + 1):
        assert net(torch.tensor(1.0)) == 7  # (1 * 2 + 1) * 2 + 1
    assert net(torch.tensor(1.0)) == 4


def test_hooks_are_removed_when_the_block_fails() -> None:
    net = CallsTwice()
    with pytest.raises(TypeError), observe_calls({0: net.twice}, before=lambda *_: None, after=lambda *_: None):
        net(torch.tensor(1.0), factor=0)  # the net itself takes no factor
    assert _hook_count(net) == 0


def test_a_gradient_is_received() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    y = x * x
    gradients: list[Tensor] = []
    on_gradient(y, gradients.append)
    torch.autograd.backward(5 * y)
    assert gradients == [5]
