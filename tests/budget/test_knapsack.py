"""The knapsack against brute force over all choices."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batude_fx.budget.knapsack import allocate
from batude_fx.budget.rank_options import RankOptions, rank_candidates, site_options, smallest_costs
from batude_fx.errors import BudgetError
from batude_fx.graph.sites import ConvSite
from batude_fx.tucker.ranks import SiteLoss

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


@given(_instances())
@settings(max_examples=150, deadline=None)
def test_the_choice_fits_and_is_close_to_the_exact_optimum(instance: tuple[list[RankOptions], np.ndarray]) -> None:
    options, capacity = instance
    rows = allocate(options, capacity)
    cost = np.sum([option.costs[row] for option, row in zip(options, rows, strict=True)], axis=0)
    assert (cost <= capacity).all()
    loss = sum(option.losses[row] for option, row in zip(options, rows, strict=True))
    # A Lagrangian solution is off by at most one option of one site.
    steps = [np.diff(np.sort(option.losses)).max() for option in options]
    assert loss <= _brute_force(options, capacity) + max(steps) + 1e-9


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


@pytest.mark.parametrize(
    ("channels", "groups", "round_to", "ranks"),
    [
        (64, 1, 8, [8, 16, 24, 32, 40, 48, 56, 64]),
        (3, 1, 8, [3]),
        (20, 1, 8, [8, 16, 20]),
        (4, 32, 8, [1, 2, 3, 4]),
        (12, 2, 8, [4, 8, 12]),
        (5, 1, 1, [1, 2, 3, 4, 5]),
    ],
)
def test_ranks_are_multiples_over_all_groups(channels: int, groups: int, round_to: int, ranks: list[int]) -> None:
    assert rank_candidates(channels, groups, round_to) == ranks


def test_the_options_of_a_site_need_fewer_flops_than_the_dense_layer() -> None:
    site = ConvSite(
        "conv",
        "Conv2d",
        32,
        16,
        (3, 3),
        1,
        transposed=False,
        positions_in=400,
        positions_out=100,
        calls=1,
        found_by="fx",
    )
    loss = SiteLoss(out=np.linspace(1, 0, 17), in_=np.linspace(2, 0, 33))
    options = site_options(site, 8, adds_bias=True).with_losses(loss)
    assert options.dense.tolist() == [100 * 9 * 32 * 16, 9 * 32 * 16]
    assert (options.costs[1:, 0] < options.dense[0]).all()
    row = options.ranks.tolist().index([8, 16])
    assert options.costs[row].tolist() == [
        400 * 32 * 16 + 100 * 9 * 16 * 8 + 100 * 8 * 16,
        32 * 16 + 9 * 16 * 8 + 8 * 16 + 16,
    ]
    assert options.losses[row] == pytest.approx(0.5 + 1.0)
    assert options.only_at(8, 16) is not None
    assert options.only_at(7, 16) is None
