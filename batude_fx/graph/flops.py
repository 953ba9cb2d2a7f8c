"""Flops and parameters: of whole models, counted by fvcore, and of single sites, by formulas that agree with fvcore.

The convention is fvcore's: one multiply-add is one flop; additions and biases are free. A convolution multiplies each
weight once at each output position, a transposed convolution at each input position, a linear layer at each token; so
its flops are positions (batch included) times weights.

Source: fvcore 0.1.5, `fvcore/nn/jit_handles.py`. The only file that imports fvcore.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import DiscoveryError, first_line
from batude_fx.graph.sites import ConvSite
from batude_fx.support.arrays import Integers
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import exclusive, private_copy
from batude_fx.tucker.ranks import Ranks

# The formulas hold for integers and, element by element, for arrays of them.
Count = TypeVar("Count", int, Integers)


def dense_cost(site: ConvSite) -> tuple[int, int]:
    """Return flops and parameters of the dense layer at a site, for one run of the example input, without the bias."""
    weights = site.groups * site.group_out_channels * site.group_in_channels * prod(site.kernel_size)
    return _core_positions(site) * weights + site.own_flops, weights + site.own_params


def tucker_cost(site: ConvSite, rank_out: Count, rank_in: Count) -> tuple[Count, Count]:
    """Return flops and parameters of the Tucker-2 form of a site, for one run of the example input, without the bias.

    Each part costs its weights times the positions that it is counted at. Per group, the 1x1 `factor_in` has c_in r_in
    weights, at the input positions P_in. The core has K r_in r_out, with K elements in the kernel, at P_core, the
    positions of the dense layer. The 1x1 `factor_out` has r_out c_out, at the output positions P_out. Together:

        flops = groups * (P_in c_in r_in + P_core K r_in r_out + P_out r_out c_out)

    A factor of full rank is left out, and a pointwise site has no core.

    Args:
        site: Any site that can be replaced.
        rank_out: Rank of mode 0, per group.
        rank_in: Rank of mode 1, per group. At a pointwise site both ranks are equal.
    """
    groups, c_out, c_in = site.groups, site.group_out_channels, site.group_in_channels
    if site.is_pointwise:
        # The first part has the stride and padding, so that both parts run at the output positions.
        pair = groups * rank_in * (c_in + c_out)
        return site.positions_out * pair, pair
    first = groups * c_in * rank_in * (rank_in < c_in)
    core = groups * prod(site.kernel_size) * rank_in * rank_out
    last = groups * c_out * rank_out * (rank_out < c_out)
    flops = site.positions_in * first + _core_positions(site) * core + site.positions_out * last
    return flops, first + core + last


def site_cost(site: ConvSite, ranks: Ranks | None) -> tuple[int, int]:
    """Return flops and parameters of a site at the given ranks, or of the dense layer where `ranks` is None."""
    return dense_cost(site) if ranks is None else tucker_cost(site, ranks.rank_out, ranks.rank_in)


def _core_positions(site: ConvSite) -> int:
    """Return the positions that fvcore counts the dense layer at, and the core of its Tucker-2 form.

    `graph.call_recorder` counts the positions of a site, in one to three dimensions, when the example input runs.
    """
    return site.positions_in if site.transposed else site.positions_out


def count_flops(model: nn.Module, example_inputs: Inputs) -> int:
    """Count the flops of one run of the example input with fvcore, in eval mode.

    Args:
        model: Any module; it is not changed, also when an error is raised.
        example_inputs: Arguments of the run.

    Raises:
        DiscoveryError: torch.jit, which fvcore counts with, cannot trace the model on the example input.
    """
    with private_copy(model) as copied, exclusive, _without_warnings(), _without_fused_attention(), torch.no_grad():
        from fvcore.nn import FlopCountAnalysis  # imported here, so that `import batude_fx` stays light

        analysis = FlopCountAnalysis(_OfTensors(copied, example_inputs).eval(), tuple(example_inputs.tensors()))
        analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False)
        try:
            return int(analysis.total())
        except Exception as error:
            raise DiscoveryError(
                f"fvcore cannot count the flops of {type(model).__name__}, as torch.jit cannot trace it: "
                f"{type(error).__name__}: {first_line(error)}. Pass example_inputs= that its forward takes; it may "
                "have to return plain tensors, or containers of them."
            ) from error


class _OfTensors(nn.Module):
    """A model as a function of tensors alone, which torch.jit traces: it refuses keywords, and values of other types.

    Args:
        model: Any module.
        inputs: Its arguments; all but the tensors stay what they are here.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> object:
        remaining = iter(tensors)
        output = self.inputs.map(lambda _: next(remaining)).run(self.model)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)] or output


def count_params(model: nn.Module) -> int:
    """Count the parameters of a model; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_costs(model: nn.Module, example_inputs: Inputs) -> tuple[int, int]:
    """Return the flops of one run of the example input and the number of parameters of a model.

    Raises:
        DiscoveryError: torch.jit cannot trace the model on the example input.
    """
    return count_flops(model, example_inputs), count_params(model)


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Turn off the fused attention that torch takes when no gradients are needed, and that fvcore does not count."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress the warnings of torch.jit, with which fvcore traces: of deprecation, and of every number in a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
