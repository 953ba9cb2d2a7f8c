"""The ranks that a site may have, and what they cost."""

import numpy as np
import pytest

from batude_fx.budget.rank_options import rank_candidates, site_options
from batude_fx.graph.sites import ConvSite
from batude_fx.tucker.ranks import SiteLoss


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
