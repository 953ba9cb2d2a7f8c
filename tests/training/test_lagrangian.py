"""BC-ADL against cases that can be computed by hand, autograd, and a task whose low-rank optimum is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batude_fx.budget.rank_options import site_options
from batude_fx.training.lagrangian import Constraint, Lagrangian, truncate
from batude_fx.tucker.decomposition import unfold
from batude_fx.tucker.dense_layers import to_canonical
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import weight_spectrum
from tests.toy_networks import site_of

UNLIMITED = np.array([2**60, 2**60])


def make_constraint(layer: nn.Conv2d, *, round_to: int = 1) -> Constraint:
    site = site_of("", layer)
    return Constraint(site, layer, site_options(site, round_to))


def make_pointwise(matrix: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(matrix[:, :, None, None])
    return layer


def make_layers(seed: int = 0) -> dict[str, nn.Conv2d]:
    torch.manual_seed(seed)
    return {
        "full": nn.Conv2d(6, 9, 3, dtype=torch.float64),
        "grouped": nn.Conv2d(8, 12, 3, groups=2, dtype=torch.float64),
        "pointwise": nn.Conv2d(10, 7, 1, dtype=torch.float64),
    }


def make_lagrangian(seed: int = 0, *, rho: float = 0.5) -> Lagrangian:
    return Lagrangian({name: make_constraint(layer) for name, layer in make_layers(seed).items()}, rho=rho)


def capacity(lagrangian: Lagrangian, keep: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    dense = sum(constraint.options.dense[0] for constraint in lagrangian.constraints.values())
    return np.array([int(keep * dense), 2**60])


def test_truncation_keeps_the_largest_singular_values() -> None:
    weight = torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))[None, ..., None, None]
    spectrum = weight_spectrum(weight, pointwise=True)
    cut = truncate(weight, spectrum, Ranks(2, 2))
    torch.testing.assert_close(cut[0, :, :, 0, 0].diagonal(), torch.tensor([4.0, 3, 0, 0], dtype=torch.float64))
    assert truncate(weight, spectrum, None) is weight


def test_both_modes_are_cut() -> None:
    weight = torch.zeros(1, 3, 3, 1, 2, dtype=torch.float64)
    for index, value in enumerate((5.0, 3.0, 1.0)):
        weight[0, index, index, 0, index % 2] = value  # both unfoldings have the singular values 5, 3, 1
    cut = truncate(weight, weight_spectrum(weight, pointwise=False), Ranks(2, 2))
    diagonal = cut.sum((3, 4))[0].diagonal()
    torch.testing.assert_close(diagonal, torch.tensor([5.0, 3.0, 0.0], dtype=torch.float64))


@given(st.integers(0, 50), st.floats(0.3, 0.95))
@settings(max_examples=25, deadline=None)
def test_a_projection_meets_the_budget_with_exactly_the_planned_ranks(seed: int, keep: float) -> None:
    lagrangian = make_lagrangian(seed)
    limit = capacity(lagrangian, keep)
    lagrangian.project_(limit)
    spent = 0
    for name, constraint in lagrangian.constraints.items():
        z, ranks = to_canonical(lagrangian.z[name], constraint.layer), lagrangian.ranks[name]
        full = Ranks(constraint.site.group_out_channels, constraint.site.group_in_channels)
        row = (
            0
            if ranks is None
            else int(np.flatnonzero((constraint.options.ranks == (ranks.rank_out, ranks.rank_in)).all(1))[0])
        )
        spent += int(constraint.options.costs[row, 0])
        expected = ranks or full
        # A mode cannot have a higher rank than the rest of the tensor allows.
        for mode, rank in ((0, expected.rank_out), (1, expected.rank_in)):
            rank_found = torch.linalg.matrix_rank(unfold(z, mode))
            assert (rank_found <= rank).all()
            if constraint.site.is_pointwise:
                assert (rank_found == min(rank, *z.shape[1:3])).all()
    assert spent <= limit[0]


def test_the_penalty_is_the_gradient_of_its_formula() -> None:
    lagrangian = make_lagrangian(rho=0.7)
    lagrangian.project_(capacity(lagrangian, 0.5))
    lagrangian.update_duals_()
    for constraint in lagrangian.constraints.values():
        constraint.weight.grad = torch.ones_like(constraint.weight)
    weights = {
        name: constraint.weight.detach().clone().requires_grad_() for name, constraint in lagrangian.constraints.items()
    }
    penalty = sum(
        ((w - lagrangian.z[name] + lagrangian.u[name]).square().sum() for name, w in weights.items()), torch.zeros(())
    )
    torch.autograd.backward(0.7 / 2 * penalty)
    lagrangian.penalty_()
    for name, constraint in lagrangian.constraints.items():
        torch.testing.assert_close(constraint.weight.grad, 1 + weights[name].grad)


def test_a_frozen_weight_gets_no_penalty() -> None:
    lagrangian = make_lagrangian()
    lagrangian.penalty_()
    assert all(constraint.weight.grad is None for constraint in lagrangian.constraints.values())


def test_duals_and_residuals_equal_those_computed_by_hand() -> None:
    lagrangian = Lagrangian({"a": make_constraint(make_pointwise(torch.diag(torch.tensor([4.0, 3.0, 1.0]))))}, rho=1.0)
    options = lagrangian.constraints["a"].options
    lagrangian.project_(options.costs.min(axis=0))  # rank 1
    residuals = lagrangian.update_duals_()
    assert lagrangian.ranks == {"a": Ranks(1, 1)}
    torch.testing.assert_close(
        lagrangian.z["a"][..., 0, 0], torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64))
    )
    torch.testing.assert_close(
        lagrangian.u["a"][..., 0, 0], torch.diag(torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64))
    )
    assert residuals.primal == residuals.dual == pytest.approx((10 / 26) ** 0.5)
    lagrangian.rescale_(2.0)
    torch.testing.assert_close(lagrangian.u["a"][1, 1, 0, 0], torch.tensor(1.5, dtype=torch.float64))


def _minimise(target: Tensor, lagrangian: Lagrangian, limit: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[float]:
    """Do 200 rounds on `|W - target|^2 / 2`, whose W-step has a closed form; return the primal residuals."""
    (constraint,) = lagrangian.constraints.values()
    primal = []
    for _ in range(200):
        lagrangian.project_(limit)
        primal.append(lagrangian.update_duals_().primal)
        with torch.no_grad():
            constraint.weight.copy_(
                (target + lagrangian.rho * (lagrangian.z["a"] - lagrangian.u["a"])) / (1 + lagrangian.rho)
            )
    return primal


def test_a_quadratic_task_ends_at_its_best_low_rank_solution() -> None:
    torch.manual_seed(3)
    target = torch.randn(9, 7, dtype=torch.float64)[:, :, None, None]
    lagrangian = Lagrangian({"a": make_constraint(make_pointwise(target[..., 0, 0]))}, rho=2.0)
    options = lagrangian.constraints["a"].options
    limit = options.costs[(options.ranks == (3, 3)).all(1)][0]
    primal = _minimise(target, lagrangian, limit)
    left, values, right = torch.linalg.svd(target[..., 0, 0])
    best = left[:, :3] * values[:3] @ right[:3]  # Eckart, Young 1936
    assert primal[-1] < 1e-6 < primal[0]
    torch.testing.assert_close(lagrangian.constraints["a"].weight.detach()[..., 0, 0], best, atol=1e-5, rtol=0)
