"""Wall time of networks and layers, measured so that what slows one slows all: medians over turns."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from time import perf_counter

import torch
from torch import nn

from batude_fx.borrowing import borrowed

_WARM_UP = 2


def now() -> float:
    """Seconds, when all that was asked of the accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter()


def alternating(
    networks: Sequence[nn.Module], inputs: tuple[object, ...], *, turns: int, seconds: float = 0
) -> list[float]:
    """Median seconds of one run of each network in eval mode, all of them taking turns.

    Args:
        networks: All of them take the inputs.
        inputs: Arguments of a run.
        turns: Timed ones, at least.
        seconds: Go on until so many have passed.
    """
    with ExitStack() as stack, torch.inference_mode():
        for network in networks:
            stack.enter_context(borrowed(network))
        return in_turns([lambda network=network: network(*inputs) for network in networks], turns, seconds)  # type: ignore[misc]


def in_turns(calls: Sequence[Callable[[], object]], turns: int, seconds: float = 0) -> list[float]:
    """Median seconds of each call, all of them taking turns, after a warm-up."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(_WARM_UP):
        for call in calls:
            call()
    start = now()
    while len(taken[0]) < turns or now() - start < seconds:
        for call, times in zip(calls, taken, strict=True):
            before = now()
            call()
            times.append(now() - before)
    return [median(times) for times in taken]
