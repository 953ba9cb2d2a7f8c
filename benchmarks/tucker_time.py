"""Seconds of our Tucker-2 decomposition against tensorly's `partial_tucker`, on layers of ResNet-50 and ResNeXt-50.

Run `python -m benchmarks.tucker_time`; two minutes. Both decompose the same random weight to the same ranks (half of
each mode) by HOSVD and ten sweeps of HOOI, alternating in one process on one thread. tensorly decomposes one group at a
time, ours all groups in one call. The last column is the ratio of the errors, which is 1 if both reach the same
approximation. `tests/tucker/test_decomposition.py` holds the two equal in float64.
"""

import time
from collections.abc import Callable
from statistics import median

import tensorly
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tensorly.decomposition import partial_tucker
from torch import Tensor

from batude_fx.tucker import decomposition
from benchmarks.published import environment, publish

LAYERS = {  # (groups, C_out, C_in, k, k)
    "64 > 64 3x3": (1, 64, 64, 3, 3),
    "256 > 256 3x3": (1, 256, 256, 3, 3),
    "512 > 512 3x3": (1, 512, 512, 3, 3),
    "1024 > 1024 3x3 /32": (32, 32, 32, 3, 3),
}
SWEEPS = 10
ROUNDS, WARM_UP = 7, 1


def main() -> None:
    """Measure every layer, print and publish the table."""
    console, where = Console(width=100), environment()
    shown = Table("layer", "ours, ms", "tensorly, ms", "tensorly / ours", "error, ours / tensorly")
    for layer, shape in track(LAYERS.items(), "decomposing", console=console, transient=True):
        own, other, errors = measure(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        shown.add_row(
            layer, f"{own * 1e3:.1f}", f"{other * 1e3:.1f}", f"{other / own:.1f} x", f"{errors[0] / errors[1]:.4f}"
        )
    console.print(where)
    console.print(shown)
    publish("tucker_time", shown, where)


def measure(weight: Tensor) -> tuple[float, float, tuple[float, float]]:
    """Return the median seconds of ours and of tensorly, and their errors."""
    ranks = weight.shape[1] // 2, weight.shape[2] // 2
    sides: list[Callable[[], Tensor]] = [
        lambda: _dense(*decomposition.hooi(weight, *ranks, sweeps=SWEEPS)),
        lambda: torch.stack([_by_tensorly(group, ranks) for group in weight]),
    ]
    walls: list[list[float]] = [[], []]
    errors = [0.0, 0.0]
    for turn in range(ROUNDS + WARM_UP):
        for side, call in enumerate(sides):
            start = time.perf_counter()
            approximation = call()
            if turn >= WARM_UP:
                walls[side].append(time.perf_counter() - start)
            errors[side] = float((approximation - weight).norm())
    return median(walls[0]), median(walls[1]), (errors[0], errors[1])


def _dense(core: Tensor, factor_out: Tensor, factor_in: Tensor) -> Tensor:
    return decomposition.mode_product(decomposition.mode_product(core, factor_out, 0), factor_in, 1)


def _by_tensorly(weight: Tensor, ranks: tuple[int, int]) -> Tensor:
    (core, factors), _ = partial_tucker(weight, ranks, modes=[0, 1], init="svd", n_iter_max=SWEEPS, tol=0)
    dense: Tensor = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    return dense


if __name__ == "__main__":
    torch.set_num_threads(1)
    tensorly.set_backend("pytorch")
    main()
