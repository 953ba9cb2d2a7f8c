"""A private copy of a model runs without any effect on the model, whatever the model keeps things in."""

import copy
import os
import queue
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batude_fx import BatudeError
from batude_fx.support.model_state import exclusive, private_copy


class _Frozen(dict[str, Any]):
    """A dict as diffusers' FrozenDict is one: it refuses to be changed."""

    def update(self, *_: object, **__: object) -> None:
        raise TypeError("frozen")

    clear = pop = update


@dataclass(slots=True)
class _Slotted:
    last: Tensor


class _Keeps(nn.Module):
    """Keeps its last output wherever a model can keep something."""

    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("running", torch.zeros(4))
        self.config = _Frozen(width=4)
        self.listed: list[Any] = [torch.zeros(1)]
        self.queue: deque[Any] = deque([torch.zeros(1)])
        self.named: dict[str, Any] = {"inner": {"last": torch.zeros(1)}}
        self.ordered = OrderedDict(a=torch.zeros(1))
        self.pair = (SimpleNamespace(last=torch.zeros(1)), {torch.float32}, _Slotted(torch.zeros(1)))
        self.tensor = torch.zeros(1, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        self.running.mul_(0.9).add_(y.mean((0, 2, 3)))
        self.tensor.copy_(y)
        self.listed[0] = y
        self.queue.append(y)
        self.named["inner"]["last"] = y
        self.named["new"] = y
        self.ordered.move_to_end("a")
        self.ordered["b"] = y
        self.pair[0].last = y
        self.pair[1].add(y.dtype if y.dtype != torch.float32 else torch.float64)
        self.pair[2].last = y
        self.last = y
        return y


def _kept(model: _Keeps) -> list[object]:
    return [
        list(model.listed), list(model.queue), dict(model.named["inner"]), list(model.named), list(model.ordered),
        model.pair[0].last, set(model.pair[1]), model.pair[2].last, dict(model.config), sorted(vars(model)),
    ]  # fmt: skip


def test_what_a_model_keeps_stays_what_it_kept() -> None:
    model = _Keeps().train()
    before, running = _kept(model), model.running.clone()
    with private_copy(model) as copied:
        copied(torch.ones(1, 3, 2, 2, requires_grad=True))
        assert not copied.training
        assert copied.running.any()
    assert _kept(model) == before
    assert torch.equal(model.running, running)
    assert not model.tensor.any()
    assert model.training
    copy.deepcopy(model)  # torch refuses to copy tensors that have a graph


def test_values_of_parameters_are_shared_and_need_no_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.register_parameter("tied", model[0].weight)
    with private_copy(model) as copied:
        assert copied[0].weight.data_ptr() == model[0].weight.data_ptr()
        assert copied.tied is copied[0].weight
        assert not any(parameter.requires_grad for parameter in copied.parameters())
        assert copied[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    assert all(parameter.requires_grad for parameter in model.parameters())


class _Quantized(nn.Parameter):
    """A parameter with a scale, as some quantizing packages have."""

    scale: float


def test_parameters_keep_their_class_and_attributes() -> None:
    model = nn.Linear(2, 2)
    weight = _Quantized(model.weight.detach())
    weight.scale = 0.5
    model.weight = weight
    with private_copy(model) as copied:
        assert type(copied.weight) is _Quantized
        assert copied.weight.scale == 0.5
        assert copied.weight.data_ptr() == weight.data_ptr()
        assert not copied.weight.requires_grad
    assert weight.requires_grad


def test_other_threads_go_on_with_what_the_model_holds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    jobs: deque[str] = deque()
    vars(model).update(jobs=jobs, log=[])
    with private_copy(model) as copied:
        jobs.append("job")
        vars(model)["log"].append(1)
        vars(copied)["log"].append(2)
    assert list(vars(model)["jobs"]) == ["job"]
    assert vars(model)["log"] == [1]


def test_random_numbers_are_drawn_from_where_they_were() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with private_copy(nn.Sequential()):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("part", [threading.Lock(), queue.Queue()])
def test_a_model_that_cannot_be_copied_is_refused_with_a_way_out(part: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    vars(model)["part"] = part
    with pytest.raises(BatudeError, match=r"cannot be copied: .*Drop handles to files, locks"), private_copy(model):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_that_is_forked_meanwhile_can_take_the_lock() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive:
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    if (child := os.fork()) == 0:
        os._exit(0 if exclusive.acquire(timeout=5) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_process_that_is_forked_inside_can_draw_and_leave() -> None:
    with private_copy(nn.Linear(1, 1)):
        child = os.fork()
        if not child:
            with private_copy(nn.Linear(1, 1)):
                torch.rand(1)
    if not child:  # it has left both blocks
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_random_states_are_restored_where_copies_of_two_threads_overlap() -> None:
    before = torch.get_rng_state()
    first, second = private_copy(nn.ReLU()), private_copy(nn.ReLU())
    first.__enter__()
    torch.rand(1)
    second.__enter__()
    first.__exit__(None, None, None)
    torch.rand(1)
    second.__exit__(None, None, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_random_state_is_kept_that_another_thread_is_about_to_undo() -> None:
    """As while that thread builds a network, whose initial weights are drawn."""
    before, drawn, kept = torch.get_rng_state(), threading.Event(), threading.Event()

    def build() -> None:
        with exclusive, torch.random.fork_rng(devices=()):
            torch.rand(1)
            drawn.set()
            kept.wait(0.2)

    thread = threading.Thread(target=build)
    thread.start()
    drawn.wait()
    with private_copy(nn.ReLU()):
        kept.set()
        thread.join()
    assert torch.equal(torch.get_rng_state(), before)
