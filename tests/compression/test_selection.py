"""Patterns, kinds of layers and ranks given by hand decide what is replaced."""

import re

import pytest
import torch
from torch import nn

import batude_fx
from batude_fx.errors import SelectionError
from batude_fx.tucker.ranks import Ranks
from tests.compression.common import EXAMPLE
from tests.toy_networks import varied_net


def _replaced(**options: object) -> set[str]:
    return set(batude_fx.plan(varied_net(), 0.9, example_inputs=EXAMPLE, calibration=None, **options).ranks)


def test_globs_choose_the_sites() -> None:
    assert _replaced(include="mix") == {"mix"}
    assert "mix" not in _replaced(exclude=["m*"])


def test_linear_layers_are_replaced_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 64), nn.Linear(64, 64))
    options = {"example_inputs": EXAMPLE, "calibration": None}
    assert set(batude_fx.plan(model, 0.5, layers="conv+linear", **options).ranks) >= {"2"}
    with pytest.raises(SelectionError, match=r"conv\+linear"):
        batude_fx.plan(model, 0.5, layers="linear", **options)


@pytest.mark.parametrize("pattern", ["nothing", "mix.*"])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str, pattern: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(repr(pattern))):
        _replaced(**{option: pattern})


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_ranks_are_multiples(round_to: int) -> None:
    plan = batude_fx.plan(varied_net(width=24), 0.5, example_inputs=EXAMPLE, calibration=None, round_to=round_to)
    full = {site.name: (site.group_out_channels, site.group_in_channels) for site in plan.sites}
    for name, ranks in plan.ranks.items():
        for rank, channels in zip((ranks.rank_out, ranks.rank_in), full[name], strict=True):
            assert rank % round_to == 0 or rank == channels


def test_ranks_can_be_fixed_and_sites_kept_dense() -> None:
    plan = batude_fx.plan(
        varied_net(), 0.9, example_inputs=EXAMPLE, calibration=None, ranks={"mix": Ranks(8, 8), "shared": None}
    )
    assert plan.ranks["mix"] == Ranks(8, 8)
    assert "shared" not in plan.ranks
    with pytest.raises(SelectionError, match="not among its options"):
        batude_fx.plan(varied_net(), 0.9, example_inputs=EXAMPLE, calibration=None, ranks={"mix": Ranks(9, 8)})


def test_a_layer_with_an_extra_buffer_stays_dense() -> None:
    model = varied_net()
    model.stem.register_buffer("gain", torch.ones(1))
    (stem,) = (site for site in batude_fx.discover(model, EXAMPLE) if site.name == "stem")
    assert stem.skip_reason == "holds more than a weight and a bias, which its replacement would lose"
