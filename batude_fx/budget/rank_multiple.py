"""The rank multiple that suits this machine, for `round_to="auto"`.

Processors compute with vectors of a fixed length, so that a rank just above a multiple of it takes as long as the next
multiple. Coarse multiples waste part of the budget, fine ones part of the speed: the finest one that is nearly as fast
per flop as multiples of 32 is best. It is found by timing the kinds of layers that take the longest.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from batude_fx.budget.layer_timer import LayerTimer

_MULTIPLES = (4, 8, 16, 32)
_COARSEST = _MULTIPLES[-1]
_NEARLY_AS_FAST = 0.95  # of the speed at multiples of 32
_PROBED = 6  # kinds of layers that are timed


def suitable_multiples(timer: LayerTimer) -> Sequence[int]:
    """Return the smallest rank multiple that is nearly as fast per flop as multiples of 32, then the finer ones."""
    probed = _longest_kinds(timer)
    if not probed:
        return _MULTIPLES[1::-1]  # 8, as by default, and finer
    speeds = [[_relative_speed(timer, name, multiple) for multiple in _MULTIPLES] for name in probed]
    timer.keep_times()
    best = next(index for index, speed in enumerate(np.mean(speeds, axis=0)) if speed >= _NEARLY_AS_FAST)
    return _MULTIPLES[best::-1]


def _longest_kinds(timer: LayerTimer) -> list[str]:
    """Return a site of each kind of layer that takes the longest in all; equal layers with equal inputs are a kind."""
    total: Counter[Hashable] = Counter()
    examples: dict[Hashable, str] = {}
    for name, calls in timer.calls.items():
        if _channels(timer, name) >= 3 * _COARSEST:
            kind = repr(timer.model.get_submodule(name)), frozenset(calls.items())
            total[kind] += timer.nanoseconds(name, None)
            examples[kind] = name
    return [examples[kind] for kind, _ in total.most_common(_PROBED)]


def _relative_speed(timer: LayerTimer, name: str, multiple: int) -> float:
    """Return the speed at odd multiples of a number, relative to that at the multiples of 32 around them."""
    low = max(_COARSEST, _channels(timer, name) // 3 // _COARSEST * _COARSEST)
    ranks = [low + odd * multiple for odd in range(1, _COARSEST // multiple, 2)] or [low]
    ends = [timer.nanoseconds(name, (rank, rank)) for rank in (low, low + _COARSEST)]
    between = np.interp(ranks, (low, low + _COARSEST), ends)
    return float(np.mean(between / [timer.nanoseconds(name, (rank, rank)) for rank in ranks]))


def _channels(timer: LayerTimer, name: str) -> int:
    """Return the smaller channel count of an ungrouped site; 0 for a grouped one, which is not probed."""
    site = timer.sites[name]
    return min(site.group_in_channels, site.group_out_channels) if site.groups == 1 else 0
