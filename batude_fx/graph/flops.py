"""What a model costs: fvcore for whole models, closed integer formulas for single sites, equal to the last flop.

The convention is fvcore's: one multiply-add is one flop, additions and biases are free. A convolution costs batch *
weight elements * output positions; a transposed one is counted at its input positions, a linear layer at its tokens.

Source: fvcore 0.1.5, `fvcore/nn/jit_handles.py`. The only module that imports fvcore.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from batude_fx.errors import DiscoveryError, first_line
from batude_fx.graph.sites import ConvSite
from batude_fx.support.model_state import eval_and_restore
from batude_fx.tucker.ranks import Ranks

# The formulas hold for integers and, element by element, for arrays of them.
Count = TypeVar("Count", int, NDArray[np.int64])


def dense_cost(site: ConvSite) -> tuple[int, int]:
    """Flops and parameters of the dense layer at a site, for one run of the example input; bias is free."""
    weights = site.groups * site.group_out_channels * site.group_in_channels * prod(site.kernel_size)
    return _core_positions(site) * weights + site.own_flops, weights + site.own_params


def tucker_cost(site: ConvSite, rank_out: Count, rank_in: Count) -> tuple[Count, Count]:
    """Flops and weight parameters of the Tucker-2 form of a site, for one run of the example input; bias is free.

    Args:
        site: Any site that can be replaced.
        rank_out: Rank of mode 0, per group; the full rank drops `factor_out`.
        rank_in: Rank of mode 1, per group; the full rank drops `factor_in`. At a pointwise site both are equal.
    """
    groups, c_out, c_in = site.groups, site.group_out_channels, site.group_in_channels
    if site.is_pointwise:
        # Stride and padding sit on the first part, so both run at the output positions.
        pair = groups * rank_in * (c_in + c_out)
        return site.positions_out * pair, pair
    first = groups * c_in * rank_in * (rank_in < c_in)
    core = groups * prod(site.kernel_size) * rank_in * rank_out
    last = groups * c_out * rank_out * (rank_out < c_out)
    flops = site.positions_in * first + _core_positions(site) * core + site.positions_out * last
    return flops, first + core + last


def site_cost(site: ConvSite, ranks: Ranks | None) -> tuple[int, int]:
    """Flops and weight parameters of a site at some ranks, or dense where there are none."""
    return dense_cost(site) if ranks is None else tucker_cost(site, ranks.rank_out, ranks.rank_in)


def _core_positions(site: ConvSite) -> int:
    return site.positions_in if site.transposed else site.positions_out


def count_flops(model: nn.Module, example_inputs: tuple[object, ...]) -> int:
    """Multiply-adds of one run of the example input, counted by fvcore in eval mode.

    Args:
        model: Any module; it is the same afterwards, also when an error is raised.
        example_inputs: Arguments of the run.

    Raises:
        DiscoveryError: torch.jit, which fvcore counts with, cannot trace the model on the example input.
    """
    with eval_and_restore(model), _quiet(), _unfused(), torch.no_grad():
        from fvcore.nn import FlopCountAnalysis  # imported here, so that `import batude_fx` stays light

        analysis = FlopCountAnalysis(model, example_inputs)
        analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
        try:
            return int(analysis.total())
        except Exception as error:
            raise DiscoveryError(
                f"fvcore cannot count the flops of {type(model).__name__}, as torch.jit cannot trace it: "
                f"{type(error).__name__}: {first_line(error)}. Its forward may have to take and give plain tensors; "
                "example_inputs= says which it takes."
            ) from error


def count_params(model: nn.Module) -> int:
    """Parameters of a model; one that is shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_costs(model: nn.Module, example_inputs: tuple[object, ...]) -> tuple[int, int]:
    """Flops of one run of the example input, as `count_flops`, and parameters of a whole model.

    Raises:
        DiscoveryError: As `count_flops`.
    """
    return count_flops(model, example_inputs), count_params(model)


@contextmanager
def _unfused() -> Iterator[None]:
    """Without gradients torch's attention takes a fused path that fvcore does not see; with them it does not."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _quiet() -> Iterator[None]:
    """fvcore traces with torch.jit, which warns of its own age and of every Python number in a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
