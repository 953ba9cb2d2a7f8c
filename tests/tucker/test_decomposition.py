"""The tensor algebra of Tucker-2 compared with tensorly and with singular value decompositions, in float64."""

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker

from batude_fx.tucker import decomposition

shapes = st.tuples(
    st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.sampled_from([(), (1,), (3,), (3, 2), (2, 2, 2)])
)


def _weight(shape: tuple[int, int, int, tuple[int, ...]]) -> torch.Tensor:
    groups, c_out, c_in, kernel = shape
    generator = torch.Generator().manual_seed(c_out * 100 + c_in)
    return torch.randn(groups, c_out, c_in, *kernel, dtype=torch.float64, generator=generator)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_unfoldings_and_mode_products_are_those_of_tensorly(shape: tuple[int, int, int, tuple[int, ...]]) -> None:
    weight = _weight(shape)
    for mode in (0, 1):
        matrix = torch.randn(weight.shape[0], 3, weight.shape[mode + 1], dtype=torch.float64)
        product = decomposition.mode_product(weight, matrix, mode)
        for group in range(weight.shape[0]):
            with tl.backend_context("pytorch"):
                expected = tl.tenalg.mode_dot(weight[group], matrix[group], mode)
                unfolding = tl.unfold(weight[group], mode)
            torch.testing.assert_close(product[group], expected)
            torch.testing.assert_close(decomposition.unfold(weight, mode)[group], unfolding)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_mode_spectra_are_squared_singular_values(shape: tuple[int, int, int, tuple[int, ...]]) -> None:
    weight = _weight(shape)
    for mode in (0, 1):
        values, vectors = decomposition.mode_spectrum(weight, mode)
        singular = torch.linalg.svdvals(decomposition.unfold(weight, mode)).square()
        count = singular.shape[-1]
        torch.testing.assert_close(values[..., :count], singular)
        identity = torch.eye(vectors.shape[-1], dtype=torch.float64).expand(vectors.shape)
        torch.testing.assert_close(vectors.mT @ vectors, identity)


@pytest.mark.parametrize("ranks", [(3, 4), (6, 2), (8, 5)])
def test_hooi_is_as_good_as_tensorly(ranks: tuple[int, int]) -> None:
    weight = _weight((2, 8, 5, (3, 3)))
    core, factor_out, factor_in = decomposition.hooi(weight, *ranks, sweeps=50)
    ours = decomposition.mode_product(decomposition.mode_product(core, factor_out, 0), factor_in, 1)
    for group in range(2):
        with tl.backend_context("pytorch"):
            (tl_core, tl_factors), _ = partial_tucker(
                weight[group], ranks, modes=[0, 1], init="svd", n_iter_max=500, tol=1e-12
            )
            theirs = tl.tenalg.multi_mode_dot(tl_core, tl_factors, modes=[0, 1])
        assert (ours[group] - weight[group]).norm() <= (theirs - weight[group]).norm() * (1 + 1e-6) + 1e-10


def test_hosvd_at_full_rank_is_exact() -> None:
    weight = _weight((2, 6, 4, (3, 3)))
    core, factor_out, factor_in = decomposition.hosvd(weight, 6, 4)
    rebuilt = decomposition.mode_product(decomposition.mode_product(core, factor_out, 0), factor_in, 1)
    torch.testing.assert_close(rebuilt, weight, atol=1e-12, rtol=0)
