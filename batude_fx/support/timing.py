"""Wall time of networks and layers, measured so that what slows one slows all: over turns, medians or the shortest."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import nn

from batude_fx.support.model_state import eval_and_restore

_WARM_UP = 2
_CPU = torch.device("cpu")


def now(device: torch.device = _CPU) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return perf_counter()


def time_networks(
    networks: Sequence[nn.Module], inputs: tuple[object, ...], *, turns: int, seconds: float = 0
) -> list[float]:
    """Median seconds of one run of each network in eval mode, all of them taking turns.

    Args:
        networks: All of them take the inputs.
        inputs: Arguments of a run.
        turns: Timed ones, at least.
        seconds: Go on until so many have passed.
    """
    with ExitStack() as stack, torch.no_grad():
        for network in networks:
            stack.enter_context(eval_and_restore(network))
        calls = [partial(network, *inputs) for network in networks]
        return time_calls(calls, turns, seconds, next(networks[0].parameters(), torch.empty(0)).device)


def time_calls(
    calls: Sequence[Callable[[], object]],
    turns: int,
    seconds: float = 0,
    device: torch.device = _CPU,
    among: Callable[[list[float]], float] = median,
) -> list[float]:
    """Seconds of each call on a device, all of them taking turns, after a warm-up.

    Args:
        calls: What is timed.
        turns: As of `alternating`.
        seconds: Likewise.
        device: Whose work is waited for.
        among: From the times of the turns to the one that counts: the median, or `min`, which other work on the machine
            disturbs least.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(_WARM_UP):
        for call in calls:
            call()
    start = now(device)
    while len(taken[0]) < turns or now(device) - start < seconds:
        for call, times in zip(calls, taken, strict=True):
            before = now(device)
            call()
            times.append(now(device) - before)
    return [among(times) for times in taken]
