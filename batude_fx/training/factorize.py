"""From trained weights of low rank to Tucker modules, and the last touches to a network before it is saved.

Source: HOSVD and HOOI as in `tucker`.
"""

from collections.abc import Mapping
from dataclasses import replace as replaced
from typing import TypeVar

from torch import Tensor, nn

from batude_fx.graph.surgery import replace_modules
from batude_fx.tucker.decomposition import Factors, hooi, mode_product
from batude_fx.tucker.dense_layers import canonical_bias, canonical_weight
from batude_fx.tucker.modules import tucker_conv
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import weight_spectrum

ModelT = TypeVar("ModelT", bound=nn.Module)


def factorize(model: ModelT, ranks: Mapping[str, Ranks], *, hooi_sweeps: int) -> ModelT:
    """A copy of the model with sites in Tucker form: the best factors of their weights at these ranks.

    Args:
        model: The dense network, left as it is.
        ranks: Site name to ranks, per group.
        hooi_sweeps: Of the higher-order orthogonal iteration that follows the HOSVD.
    """
    layers = {name: model.get_submodule(name) for name in ranks}
    factors = {name: _factors(canonical_weight(layers[name]), r, hooi_sweeps) for name, r in ranks.items()}
    biased = {name: replaced(one, bias=canonical_bias(layers[name])) for name, one in factors.items()}
    return replace_modules(model, {name: tucker_conv(layers[name], r, biased[name]) for name, r in ranks.items()})


def _factors(weight: Tensor, ranks: Ranks, sweeps: int) -> Factors:
    """Of a weight (groups, C_out, C_in, k...); a full rank gives no factor."""
    _, c_out, c_in, *kernel = weight.shape
    if all(extent == 1 for extent in kernel):
        return weight_spectrum(weight, pointwise=True).factors(weight, ranks)
    core, factor_out, factor_in = hooi(weight, ranks.rank_out, ranks.rank_in, sweeps=sweeps)
    # At a full rank the factor is a rotation, which the core takes over.
    cut_out, cut_in = ranks.rank_out < c_out, ranks.rank_in < c_in
    core = core if cut_out else mode_product(core, factor_out, 0)
    core = core if cut_in else mode_product(core, factor_in, 1)
    return Factors(factor_in if cut_in else None, core, factor_out if cut_out else None, bias=None)
