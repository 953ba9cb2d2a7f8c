"""The two verbs: `plan` decides the ranks under a budget, `compress` also builds the network that has them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from batude_fx import allocation, flops
from batude_fx.budget import Budget
from batude_fx.calibration import (
    Images,
    Inputs,
    SiteStatistics,
    image_batches,
    mixed,
    normalized_by,
    statistics,
    synthetic_batches,
)
from batude_fx.discovery import discover
from batude_fx.errors import BudgetError, CalibrationError, SelectionError, UnsupportedError
from batude_fx.handlers import canonical_bias, canonical_weight
from batude_fx.modules import TuckerModule, tucker_conv
from batude_fx.progress import track
from batude_fx.sites import ConvSite, Ranks
from batude_fx.spectra import Spectrum, metric_spectrum, weight_spectrum
from batude_fx.surgery import replace
from batude_fx.tucker import Factors
from batude_fx.zoo import example_inputs as default_inputs

ModelT = TypeVar("ModelT", bound=nn.Module)
Calibration = Images | Literal["synthetic"] | None

_UNLIMITED = 2**60


@dataclass(frozen=True)
class Plan:
    """Which sites get which ranks, and what that costs; made by `plan`.

    Attributes:
        model_name: Class of the model.
        budget: What the user asked for.
        sites: Every convolution, in the order of its first call, the skipped ones included.
        ranks: Site name to its ranks, for the sites that are replaced.
        losses: Site name to predicted loss, for the sites that are replaced.
        dense_flops: Multiply-adds of the model, by fvcore.
        flops: Multiply-adds of the compressed model, as fvcore will count them.
        dense_params: Parameters of the model.
        params: Parameters of the compressed model.
        calibration: `"weights only"`, `"synthetic"` or `"images"`.
    """

    model_name: str
    budget: Budget
    sites: tuple[ConvSite, ...]
    ranks: Mapping[str, Ranks]
    losses: Mapping[str, float]
    dense_flops: int
    flops: int
    dense_params: int
    params: int
    calibration: str
    _spectra: Mapping[str, Spectrum] = field(repr=False, compare=False)
    _statistics: Mapping[str, SiteStatistics] = field(repr=False, compare=False)

    def apply(self, model: ModelT) -> ModelT:
        """The compressed copy of the model that this plan was made for.

        Raises:
            SelectionError: When the model lacks a site of the plan.
            UnsupportedError: When a site has another shape than in the plan.
        """
        modules = dict(model.named_modules())
        for name in self.ranks:
            if name not in modules:
                raise SelectionError(f"{type(model).__name__} has no site {name!r}; apply the plan to its own model.")
        return replace(model, {name: self._replacement(name, modules[name]) for name in self.ranks})

    def __str__(self) -> str:
        """The plan as a table."""
        from batude_fx.report import plan_table

        return plan_table(self)

    def _replacement(self, name: str, layer: nn.Module) -> TuckerModule:
        weight = canonical_weight(layer)
        factors = self._spectra[name].factors(weight, self.ranks[name])
        factors = replaced(factors, bias=canonical_bias(layer))
        if name not in self._statistics:
            return tucker_conv(layer, self.ranks[name], factors)
        return _with_mean_output(layer, self.ranks[name], factors, self._statistics[name].mean_input)


def plan(  # noqa: PLR0913 - each one is a question that a user of compress asks
    model: nn.Module,
    budget: Budget | float | str,
    *,
    example_inputs: Tensor | Inputs | None = None,
    calibration: Calibration = "synthetic",
    layers: str = "conv",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    round_to: int = 8,
    ranks: Mapping[str, Ranks | None] | None = None,
) -> Plan:
    """Decide the Tucker-2 ranks of a model under a budget.

    Args:
        model: Any module; it is bit-identical afterwards.
        budget: The fraction of flops that remains (0.5), a factor ("2.5x"), a percentage ("40%"), an absolute count
            ("0.9GFLOPs"), or a `Budget` with several limits. Flops are fvcore's: one multiply-add is one.
        example_inputs: Arguments of one run, (1, C, H, W) for an image model. By default what timm or torchvision
            knows of the model.
        calibration: Unlabelled images, normalized as for evaluation: a tensor (N, C, H, W), an iterable of batches or
            a DataLoader. "synthetic" generates some; None looks at the weights alone.
        layers: "conv", or "conv+linear" to replace linear layers too.
        include: Globs over qualified names; only sites that match one are replaced.
        exclude: Globs; sites that match one stay dense.
        round_to: Ranks are multiples of this, all groups of a site together.
        ranks: Site name to ranks that are fixed beforehand; None keeps a site dense.

    Returns:
        The plan; `print` shows it as a table, `plan.apply(model)` builds the network.

    Raises:
        BudgetError: The budget cannot be read, or is out of reach; then the message names the smallest reachable one.
        DiscoveryError: The model has no convolution, or does not run on the example input.
        SelectionError: A pattern or a name in `ranks` matches no site.
        CalibrationError: The calibration images are empty, not finite or of the wrong shape.
        UnsupportedError: The model is in half precision or on the meta device.
    """
    budget = Budget.parse(budget)
    _check_round_to(round_to)
    _check_dtype(model)
    inputs = _arguments(model, example_inputs)
    sites = discover(model, inputs, layers=layers, include=include, exclude=exclude)
    eligible = [site for site in sites if site.skip_reason is None]
    dense = flops.count_flops(model, inputs), sum(parameter.numel() for parameter in model.parameters())
    measured = _measure(model, eligible, calibration, inputs)
    spectra = {site.name: _spectrum(model, site, measured.get(site.name)) for site in eligible}
    options = [
        allocation.site_options(site, spectra[site.name].loss(), round_to, adds_bias=site.name in measured)
        for site in eligible
    ]
    options = _fixed(options, eligible, ranks or {})
    rows, costs = _allocate(options, budget, dense, round_to)
    chosen = {
        site.name: (Ranks(*option.ranks[row].tolist()), float(option.losses[row]))
        for site, option, row in zip(eligible, options, rows, strict=True)
        if (option.costs[row] != option.dense).any()
    }
    return Plan(
        model_name=type(model).__name__,
        budget=budget,
        sites=sites,
        ranks={name: site_ranks for name, (site_ranks, _) in chosen.items()},
        losses={name: loss for name, (_, loss) in chosen.items()},
        dense_flops=dense[0],
        flops=costs[0],
        dense_params=dense[1],
        params=costs[1],
        calibration=_label(calibration),
        _spectra=spectra,
        _statistics=measured,
    )


def compress(model: ModelT, budget: Budget | float | str, **options: Any) -> ModelT:  # noqa: ANN401 - those of plan
    """A smaller model of the same class that meets the budget: `plan(model, budget, **options).apply(model)`.

    Args:
        model: Any module; it is bit-identical afterwards, also when an error is raised.
        budget: As for `plan`.
        **options: As for `plan`: `example_inputs`, `calibration`, `layers`, `include`, `exclude`, `round_to`, `ranks`.

    Returns:
        A new module of the model's own class, its convolutions replaced by Tucker-2 modules.

    Raises:
        BatudeError: As `plan`.
    """
    return plan(model, budget, **options).apply(model)


def _arguments(model: nn.Module, example_inputs: Tensor | Inputs | None) -> Inputs:
    if example_inputs is None:
        return default_inputs(model)
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


def _check_round_to(round_to: int) -> None:
    if round_to < 1:
        raise SelectionError(f"round_to={round_to} is not a rank multiple; use 1 or more, 8 by default.")


def _check_dtype(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError(f"{name} is on the meta device and has no values; load the weights first.")
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:  # noqa: PLR2004 - bytes of float32
            raise UnsupportedError(
                f"{name} is {parameter.dtype}, too coarse to decompose; compress model.float(), "
                f"then convert the result back with .to({parameter.dtype})."
            )


def _label(calibration: Calibration) -> str:
    if calibration is None:
        return "weights only"
    return "synthetic" if isinstance(calibration, str) else "images"


def _measure(
    model: nn.Module, sites: Sequence[ConvSite], calibration: Calibration, inputs: Inputs
) -> dict[str, SiteStatistics]:
    if calibration is None or not sites:
        return {}
    if isinstance(calibration, str) and calibration != "synthetic":
        raise CalibrationError(f'calibration={calibration!r}: give images, "synthetic", or None for weights only.')
    own = None
    if not isinstance(calibration, str):
        own = statistics(model, sites, track(image_batches(calibration, inputs), "calibrating"))
    batches = synthetic_batches(model, inputs)
    synthetic = statistics(normalized_by(model, batches), sites, track(batches, "calibrating, synthetic images"))
    return synthetic if own is None else mixed(own, synthetic)


def _spectrum(model: nn.Module, site: ConvSite, measured: SiteStatistics | None) -> Spectrum:
    weight = canonical_weight(model.get_submodule(site.name))
    if measured is None:
        return weight_spectrum(weight, pointwise=site.is_pointwise)
    return metric_spectrum(weight, measured.metric, pointwise=site.is_pointwise)


def _full(site: ConvSite) -> Ranks:
    return Ranks(rank_out=site.group_out_channels, rank_in=site.group_in_channels)


def _fixed(
    options: Sequence[allocation.Options], sites: Sequence[ConvSite], ranks: Mapping[str, Ranks | None]
) -> list[allocation.Options]:
    """The options, with a single one left at every site whose ranks the user fixed."""
    by_name = {site.name: (site, option) for site, option in zip(sites, options, strict=True)}
    for name, wanted in ranks.items():
        if name not in by_name:
            raise SelectionError(f"ranks are given for {name!r}, which is no replaceable site; see discover(model).")
        site, option = by_name[name]
        kept = wanted or _full(site)
        single = option.only(kept.rank_out, kept.rank_in)
        if single is None:
            raise SelectionError(
                f"{wanted} at {name!r} is not among its options: multiples of round_to up to {site.group_out_channels} "
                f"out and {site.group_in_channels} in, per group, that need fewer flops than the dense layer."
            )
        by_name[name] = site, single
    return [option for _, option in by_name.values()]


def _allocate(
    options: Sequence[allocation.Options], budget: Budget, dense: tuple[int, int], round_to: int
) -> tuple[list[int], tuple[int, int]]:
    """The row picked at each site, and flops and parameters of the whole compressed model."""
    whole = np.array(dense, np.int64)
    fixed = whole - sum((option.dense for option in options), start=np.zeros(2, np.int64))
    limits = budget.limits(*dense)
    limit = np.array([_UNLIMITED if most is None else most for most in (limits.flops, limits.params)], np.int64)
    smallest = fixed + allocation.smallest_costs(options)
    for unit, need, allowed, full in zip(("flops", "params"), smallest.tolist(), limit.tolist(), dense, strict=True):
        if need > allowed:
            keep = math.ceil(need / full * 1e4) / 1e4
            raise BudgetError(
                f"budget of {allowed / full:.4f} of the {unit} is out of reach: the smallest ranks (multiples of "
                f"{round_to}) at all {len(options)} replaceable sites still need {need:,} of {full:,} {unit}. "
                f"Use at least {keep:.4f}."
            )
    rows = allocation.allocate(options, limit - fixed)
    total = sum((option.costs[row] for option, row in zip(options, rows, strict=True)), start=fixed)
    return rows, (int(total[0]), int(total[1]))


def _with_mean_output(layer: nn.Module, ranks: Ranks, factors: Factors, mean_input: Tensor) -> TuckerModule:
    """The Tucker form of a layer, with a bias that restores the layer's mean output over the calibration images."""
    weight = cast("Tensor", layer.weight)
    channels = canonical_weight(layer).shape[:2].numel()
    bias = weight.new_zeros(channels) if factors.bias is None else factors.bias
    module = tucker_conv(layer, ranks, replaced(factors, bias=bias))
    with torch.no_grad():
        missing = (layer(mean_input[None]) - module(mean_input[None])).movedim(1 if module.kernel_size else -1, 0)
        cast("Tensor", module.bias).add_(missing.flatten(1).mean(1))
    return module
