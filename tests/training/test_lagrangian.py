"""BC-ADL against cases that can be computed by hand, autograd, and a task whose low-rank optimum is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batude_fx.budget.rank_options import site_options
from batude_fx.graph.sites import ConvSite
from batude_fx.training.lagrangian import Constraint, Lagrangian, truncate
from batude_fx.tucker.decomposition import unfold
from batude_fx.tucker.dense_layers import to_canonical
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import weight_spectrum

UNLIMITED = np.array([2**60, 2**60])


def constraint(layer: nn.Conv2d, *, round_to: int = 1) -> Constraint:
    site = ConvSite(
        "", "Conv2d", layer.in_channels, layer.out_channels, layer.kernel_size, layer.groups,
        transposed=False, positions_in=49, positions_out=49, calls=1, found_by="fx",
    )  # fmt: skip
    return Constraint(site, layer, site_options(site, round_to))


def pointwise(matrix: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(matrix[:, :, None, None])
    return layer


def layers(seed: int = 0) -> dict[str, nn.Conv2d]:
    torch.manual_seed(seed)
    return {
        "full": nn.Conv2d(6, 9, 3, dtype=torch.float64),
        "grouped": nn.Conv2d(8, 12, 3, groups=2, dtype=torch.float64),
        "pointwise": nn.Conv2d(10, 7, 1, dtype=torch.float64),
    }


def lagrangian(seed: int = 0, *, rho: float = 0.5) -> Lagrangian:
    return Lagrangian({name: constraint(layer) for name, layer in layers(seed).items()}, rho=rho)


def capacity(lagrangian: Lagrangian, keep: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    dense = sum(one.options.dense[0] for one in lagrangian.constraints.values())
    return np.array([int(keep * dense), 2**60])


def test_truncation_by_hand() -> None:
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
    split = lagrangian(seed)
    limit = capacity(split, keep)
    split.project_(limit)
    spent = 0
    for name, one in split.constraints.items():
        z, ranks = to_canonical(split.z[name], one.layer), split.ranks[name]
        full = Ranks(one.site.group_out_channels, one.site.group_in_channels)
        row = (
            0
            if ranks is None
            else int(np.flatnonzero((one.options.ranks == (ranks.rank_out, ranks.rank_in)).all(1))[0])
        )
        spent += int(one.options.costs[row, 0])
        wanted = ranks or full
        # A mode cannot have a higher rank than the rest of the tensor allows.
        for mode, rank in ((0, wanted.rank_out), (1, wanted.rank_in)):
            found = torch.linalg.matrix_rank(unfold(z, mode))
            assert (found <= rank).all()
            if one.site.is_pointwise:
                assert (found == min(rank, *z.shape[1:3])).all()
    assert spent <= limit[0]


def test_the_penalty_is_the_gradient_of_its_formula() -> None:
    split = lagrangian(rho=0.7)
    split.project_(capacity(split, 0.5))
    split.update_duals_()
    for one in split.constraints.values():
        one.weight.grad = torch.ones_like(one.weight)
    weights = {name: one.weight.detach().clone().requires_grad_() for name, one in split.constraints.items()}
    penalty = sum(((w - split.z[name] + split.u[name]).square().sum() for name, w in weights.items()), torch.zeros(()))
    torch.autograd.backward(0.7 / 2 * penalty)
    split.penalty_()
    for name, one in split.constraints.items():
        torch.testing.assert_close(one.weight.grad, 1 + weights[name].grad)


def test_a_frozen_weight_gets_no_penalty() -> None:
    split = lagrangian()
    split.penalty_()
    assert all(one.weight.grad is None for one in split.constraints.values())


def test_duals_and_residuals_by_hand() -> None:
    split = Lagrangian({"a": constraint(pointwise(torch.diag(torch.tensor([4.0, 3.0, 1.0]))))}, rho=1.0)
    options = split.constraints["a"].options
    split.project_(options.costs.min(axis=0))  # rank 1
    residuals = split.update_duals_()
    assert split.ranks == {"a": Ranks(1, 1)}
    torch.testing.assert_close(split.z["a"][..., 0, 0], torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(split.u["a"][..., 0, 0], torch.diag(torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64)))
    assert residuals.primal == residuals.dual == pytest.approx((10 / 26) ** 0.5)
    split.rescale_(2.0)
    torch.testing.assert_close(split.u["a"][1, 1, 0, 0], torch.tensor(1.5, dtype=torch.float64))


def _minimise(target: Tensor, split: Lagrangian, limit: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[float]:
    """Rounds on `|W - target|^2 / 2`, whose W-step has a closed form; returns the primal residuals."""
    (one,) = split.constraints.values()
    primal = []
    for _ in range(200):
        split.project_(limit)
        primal.append(split.update_duals_().primal)
        with torch.no_grad():
            one.weight.copy_((target + split.rho * (split.z["a"] - split.u["a"])) / (1 + split.rho))
    return primal


def test_a_quadratic_task_ends_at_its_best_low_rank_solution() -> None:
    torch.manual_seed(3)
    target = torch.randn(9, 7, dtype=torch.float64)[:, :, None, None]
    split = Lagrangian({"a": constraint(pointwise(target[..., 0, 0]))}, rho=2.0)
    options = split.constraints["a"].options
    limit = options.costs[(options.ranks == (3, 3)).all(1)][0]
    primal = _minimise(target, split, limit)
    left, values, right = torch.linalg.svd(target[..., 0, 0])
    best = left[:, :3] * values[:3] @ right[:3]  # Eckart, Young 1936
    assert primal[-1] < 1e-6 < primal[0]
    torch.testing.assert_close(split.constraints["a"].weight.detach()[..., 0, 0], best, atol=1e-5, rtol=0)
