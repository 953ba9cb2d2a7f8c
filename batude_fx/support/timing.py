"""Wall time of networks and layers that are compared: they run in turns, so that a busy machine slows all alike."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import nn

from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy

_WARM_UP = 2
_CPU = torch.device("cpu")


def now(device: torch.device = _CPU) -> float:
    """Wait until a device has finished its work, and return the time in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return perf_counter()


def time_networks(networks: Sequence[nn.Module], inputs: Inputs, *, turns: int, seconds: float = 0) -> list[float]:
    """Return the median time of a forward pass of each network in eval mode, in seconds.

    Args:
        networks: Networks that all take the inputs, on one device.
        inputs: Arguments of a forward pass.
        turns: Least number of times that each network is timed.
        seconds: Least total time; more turns follow until it has passed.
    """
    with ExitStack() as stack, torch.no_grad():
        copies = [stack.enter_context(private_copy(network)) for network in networks]
        calls = [partial(inputs.run, network) for network in copies]
        return time_calls(calls, turns, seconds, next(networks[0].parameters(), torch.empty(0)).device)


def time_calls(
    calls: Sequence[Callable[[], object]],
    turns: int,
    seconds: float = 0,
    device: torch.device = _CPU,
    summarize: Callable[[list[float]], float] = median,
) -> list[float]:
    """Return the time of each call in seconds, measured in turns after a warm-up.

    Args:
        calls: Functions to time.
        turns: Least number of times that each call is timed.
        seconds: Least total time; more turns follow until it has passed.
        device: Device that the calls use; each call is timed until the device has finished its work.
        summarize: Function from the times of all turns to the result: the median, or `min`, which other work on the
            machine disturbs least.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_WARM_UP):
        for call in calls:
            call()
    start = now(device)
    while len(times[0]) < turns or now(device) - start < seconds:
        for call, times_of_call in zip(calls, times, strict=True):
            before = now(device)
            call()
            times_of_call.append(now(device) - before)
    return [summarize(times_of_call) for times_of_call in times]
