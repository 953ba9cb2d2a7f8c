"""The knapsack against brute force over all choices."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batude_fx.budget.knapsack import allocate
from batude_fx.budget.rank_options import RankOptions, smallest_costs
from batude_fx.errors import BudgetError

UNLIMITED = 2**60


def _options(costs: list[int], losses: list[float], params: list[int] | None = None) -> RankOptions:
    """Options from lists, the dense one first."""
    both = np.array([costs, params or costs], np.int64).T
    ranks = np.stack([np.arange(len(costs)), np.arange(len(costs))], axis=1)
    return RankOptions(ranks=ranks, costs=both, losses=np.array(losses), dense=both[0])


@st.composite
def _instances(draw: st.DrawFn) -> tuple[list[RankOptions], np.ndarray]:
    """A few sites whose loss falls with cost, as spectra do, and a capacity between the smallest and the dense cost."""
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    options = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(2, 6))
        costs = np.sort(rng.integers(1, 1000, count))[::-1]
        losses = np.concatenate([[0.0], np.cumsum(rng.exponential(size=count - 1))])
        options.append(_options(costs.tolist(), losses.tolist(), rng.permutation(costs).tolist()))
    low, high = smallest_costs(options)[0], sum(option.dense[0] for option in options)
    share = draw(st.floats(0, 1))
    return options, np.array([int(low + share * (high - low)), UNLIMITED])


def _brute_force(options: list[RankOptions], capacity: np.ndarray) -> float:
    best = np.inf
    for rows in itertools.product(*(range(len(option.losses)) for option in options)):
        cost = np.sum([option.costs[row] for option, row in zip(options, rows, strict=True)], axis=0)
        if (cost <= capacity).all():
            best = min(best, sum(option.losses[row] for option, row in zip(options, rows, strict=True)))
    return float(best)


def _largest_hull_step(option: RankOptions) -> float:
    """The largest difference of the losses of neighbours on the lower convex hull of (flops, loss)."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(zip(option.costs[:, 0].tolist(), option.losses.tolist(), strict=True)):
        while len(hull) > 1 and _turns_right(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return max(abs(b[1] - a[1]) for a, b in itertools.pairwise(hull))


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])


@given(_instances())
@settings(max_examples=150, deadline=None)
def test_the_choice_fits_and_is_close_to_the_exact_optimum(instance: tuple[list[RankOptions], np.ndarray]) -> None:
    options, capacity = instance
    rows = allocate(options, capacity)
    cost = np.sum([option.costs[row] for option, row in zip(options, rows, strict=True)], axis=0)
    assert (cost <= capacity).all()
    loss = sum(option.losses[row] for option, row in zip(options, rows, strict=True))
    # A Lagrangian solution is off by at most one step of one site along the convex hull of its options.
    assert loss <= _brute_force(options, capacity) + max(map(_largest_hull_step, options)) + 1e-9


def test_both_limits_hold() -> None:
    options = [_options([100, 60, 20], [0.0, 1.0, 5.0], [100, 90, 10]) for _ in range(4)]
    capacity = np.array([300, 250])
    rows = allocate(options, capacity)
    cost = np.sum([option.costs[row] for option, row in zip(options, rows, strict=True)], axis=0)
    assert (cost <= capacity).all()
    assert sum(option.losses[row] for option, row in zip(options, rows, strict=True)) == _brute_force(options, capacity)


def test_a_capacity_that_fits_all_leaves_everything_dense() -> None:
    assert allocate([_options([100, 50], [0.0, 1.0])] * 3, np.array([300, UNLIMITED])) == [0, 0, 0]


def test_a_capacity_that_nothing_fits_is_refused() -> None:
    with pytest.raises(BudgetError):
        allocate([_options([100, 50], [0.0, 1.0])], np.array([49, UNLIMITED]))
