"""Decomposition of a network at given ranks.

Trained weights are decomposed by HOSVD and HOOI (see `tucker.decomposition`), those of the original in the metrics of
its sites, as `compress` does it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from batude_fx.calibration.moment_matching import match_moments_
from batude_fx.graph.surgery import replace_modules
from batude_fx.support.inputs import Inputs
from batude_fx.tucker.decomposition import Factors, hooi, mode_product
from batude_fx.tucker.dense_layers import canonical_bias, canonical_weight
from batude_fx.tucker.metric import Metric
from batude_fx.tucker.modules import tucker_conv
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import metric_spectrum, weight_spectrum

ModelT = TypeVar("ModelT", bound=nn.Module)


def factorize(model: ModelT, ranks: Mapping[str, Ranks], *, hooi_sweeps: int) -> ModelT:
    """Return a copy of the model with sites in Tucker form: the factors that approximate their weights best.

    Args:
        model: The dense network, which is not changed.
        ranks: Site name to ranks, per group.
        hooi_sweeps: Sweeps of the higher-order orthogonal iteration that follows the HOSVD.
    """
    layers = {name: model.get_submodule(name) for name in ranks}
    factors = {name: _factors(canonical_weight(layers[name]), r, hooi_sweeps) for name, r in ranks.items()}
    with_bias = {name: replace(parts, bias=canonical_bias(layers[name])) for name, parts in factors.items()}
    return replace_modules(model, {name: tucker_conv(layers[name], r, with_bias[name]) for name, r in ranks.items()})


def factorize_calibrated(
    model: ModelT, ranks: Mapping[str, Ranks], metrics: Mapping[str, Metric], batches: Iterable[Inputs]
) -> ModelT:
    """Return a copy of the model with sites in Tucker form: the factors that are best in the metrics, moments matched.

    Args:
        model: The dense network, which is not changed.
        ranks: Site name to ranks, per group.
        metrics: Site name to metric.
        batches: Arguments of runs, on which moments are matched.
    """
    replacements = {}
    for name, pair in ranks.items():
        layer = model.get_submodule(name)
        weight, bias = canonical_weight(layer), canonical_bias(layer)
        bias = weight.new_zeros(weight.shape[:2].numel()) if bias is None else bias
        factors = metric_spectrum(metrics[name]).factors(weight, pair)
        replacements[name] = tucker_conv(layer, pair, replace(factors, bias=bias))
    small = replace_modules(model, replacements)
    model.eval()
    small.eval()
    match_moments_(model, small, ranks.keys(), batches)
    return small


def _factors(weight: Tensor, ranks: Ranks, sweeps: int) -> Factors:
    """Return the factors of a weight (groups, C_out, C_in, k...), without a bias; a full rank gives no factor."""
    _, c_out, c_in, *kernel = weight.shape
    if all(extent == 1 for extent in kernel):
        return weight_spectrum(weight, pointwise=True).factors(weight, ranks)
    core, factor_out, factor_in = hooi(weight, ranks.rank_out, ranks.rank_in, sweeps=sweeps)
    # At a full rank the factor is square and orthogonal. Multiplied into the core, it costs no layer of its own.
    truncates_out, truncates_in = ranks.rank_out < c_out, ranks.rank_in < c_in
    core = core if truncates_out else mode_product(core, factor_out, 0)
    core = core if truncates_in else mode_product(core, factor_in, 1)
    return Factors(factor_in if truncates_in else None, core, factor_out if truncates_out else None, bias=None)
