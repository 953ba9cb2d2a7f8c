"""The two verbs: `plan` decides the ranks under a budget, `compress` also builds the compressed network."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from batude_fx.budget.budget import Budget
from batude_fx.budget.cost_limits import SearchSpace, make_search_space
from batude_fx.budget.layer_timer import LayerTimer
from batude_fx.budget.rank_options import FLOPS, PARAMS
from batude_fx.compression.calibrate import Calibration, calibration_label, match_example, measure
from batude_fx.compression.checks import (
    check_constant_sizes,
    check_example,
    check_model,
    check_options,
    check_restorable,
    warn_of_tucker_modules,
    with_dtype_hint,
)
from batude_fx.compression.latency_search import refine_by_timing, with_latency
from batude_fx.compression.plan import ModelT, Plan
from batude_fx.compression.quality_search import Evaluate, check_evaluate, check_held_back, find_smallest
from batude_fx.compression.rank_search import choose_ranks, decompose_sites
from batude_fx.errors import BudgetError, DiscoveryError
from batude_fx.graph.discovery import discover
from batude_fx.graph.flops import count_costs
from batude_fx.graph.provenance import checksum
from batude_fx.graph.site_table import Sites, dense_notes
from batude_fx.support.inputs import ExampleInputs, Inputs
from batude_fx.tucker.ranks import Ranks


def plan(  # noqa: PLR0913 - each one is a question that a user of compress asks
    model: nn.Module,
    budget: Budget | float | str,
    *,
    example_inputs: ExampleInputs | None = None,
    calibration: Calibration = "synthetic",
    layers: str = "conv",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    round_to: int | Literal["auto"] = 8,
    ranks: Mapping[str, Ranks | None] | None = None,
    evaluate: Evaluate | None = None,
) -> Plan:
    """Decide the Tucker-2 ranks of a model under a budget.

    Args:
        model: Any module; it is bit-identical afterwards.
        budget: The fraction of flops that remains (0.5), a factor ("2.5x"), a percentage ("40%"), an absolute count
            ("0.9GFLOPs"), or a `Budget` with several limits, on latency and quality among them. Flops are fvcore's: one
            multiply-add is one. Latency is the wall time of the model in eval mode on its device, with torch's current
            threads.
        example_inputs: Arguments of one run: a single tensor, (1, C, H, W) for an image model, a tuple of positional
            arguments, or a dict of keyword arguments. Batch and memory format count for latency. By default an image
            of the size of the calibration images, or else what timm or torchvision knows of the model.
        calibration: Unlabelled images, normalized as for evaluation: a tensor (N, C, H, W), an iterable of batches or
            a DataLoader. "synthetic" generates images; None uses the weights alone.
        layers: "conv", or "conv+linear" to replace linear layers too.
        include: Globs over qualified names; only sites that match one are replaced.
        exclude: Globs; sites that match one stay dense.
        round_to: Ranks are multiples of this, all groups of a site together. "auto" measures which multiple suits this
            machine, and leaves sites dense that would be no faster, as far as the budget can then be met.
        ranks: Site name to ranks that are fixed beforehand; None keeps a site dense.
        evaluate: A function from a network in eval mode to its score, the larger the better, for a budget with a
            `score` or a `max_drop`. It is called for up to eight networks and for a copy of the model.

    Returns:
        The plan; `print` shows it as a table, `plan.apply(model)` builds the network.

    Raises:
        BudgetError: The budget cannot be read, or is out of reach; then the message names the smallest reachable one,
            or the best quality that was found.
        DiscoveryError: The model has no convolution, or does not run on the example input.
        SelectionError: A pattern or a name in `ranks` matches no site, or `evaluate` does not fit the budget.
        CalibrationError: The calibration images are empty, not finite or of the wrong shape.
        UnsupportedError: The model is in half precision, on the meta device, or holds NaN; or this is called inside
            `torch.inference_mode()` or `torch.autocast()`.

    Warns:
        UserWarning: The calibration images are few or look as if they were not normalized, or the model holds Tucker
            modules already, which stay as they are.
        QualityWarning: The compressed model, which is built to be measured, often gives other outputs than the model on
            images that were held back.

    Source: ranks by a multiple-choice knapsack, H. Kellerer et al., "Knapsack Problems", 2004, chapter 11; losses by
        R. Grosse, J. Martens, ICML 2016, https://arxiv.org/abs/1602.01407; flops as fvcore's `FlopCountAnalysis`.
    """
    options = Options(
        example_inputs=example_inputs, calibration=calibration, layers=layers, include=include, exclude=exclude,
        round_to=round_to, ranks=ranks, evaluate=evaluate,
    )  # fmt: skip
    return choose(model, Budget.parse(budget), options).measured(model)


def compress(  # noqa: PLR0913 - those of plan, as editors complete them
    model: ModelT,
    budget: Budget | float | str,
    *,
    example_inputs: ExampleInputs | None = None,
    calibration: Calibration = "synthetic",
    restore: bool = False,
    layers: str = "conv",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    round_to: int | Literal["auto"] = 8,
    ranks: Mapping[str, Ranks | None] | None = None,
    evaluate: Evaluate | None = None,
) -> ModelT:
    """Compress a model to a budget: `plan(model, budget, ...).apply(model)`.

    Args:
        model: Any module; it is bit-identical afterwards, also when an error is raised.
        budget: The fraction of flops that remains (0.5), a factor ("2.5x"), a percentage ("40%"), an absolute count
            ("0.9GFLOPs"), or a `Budget` with several limits.
        example_inputs: Arguments of one run, for a model that is of neither timm nor torchvision.
        calibration: Unlabelled images, normalized as for evaluation: a tensor (N, C, H, W), an iterable of batches or
            a DataLoader. "synthetic" generates images; None uses the weights alone.
        restore: Whether the model then teaches the compressed one on these images, for minutes; it needs accelerate.
        layers: "conv", or "conv+linear" to replace linear layers too.
        include: Globs over qualified names; only sites that match one are replaced.
        exclude: Globs; sites that match one stay dense.
        round_to: Ranks are multiples of this; "auto" measures which multiple suits this machine.
        ranks: Site name to ranks that are fixed beforehand; None keeps a site dense.
        evaluate: A function from a network to its score, for a budget with a `score` or a `max_drop`.

    Returns:
        A new module of the model's own class, its convolutions replaced by Tucker-2 modules.

    Raises:
        BatudeError: As `plan`, which says more of each argument, and as `Plan.apply`.

    Warns:
        UserWarning: As `plan` and `Plan.apply`.

    Source: Tucker-2 of convolutions, Y.-D. Kim et al., ICLR 2016, https://arxiv.org/abs/1511.06530.
    """
    if restore:
        check_restorable(has_images=calibration is not None and not isinstance(calibration, str))
    options = Options(
        example_inputs=example_inputs, calibration=calibration, layers=layers, include=include, exclude=exclude,
        round_to=round_to, ranks=ranks, evaluate=evaluate,
    )  # fmt: skip
    return choose(model, Budget.parse(budget), options).apply(model, restore=restore)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments that `plan` and `compress` share; `plan` says what they are."""

    example_inputs: ExampleInputs | None = None
    calibration: Calibration
    layers: str
    include: str | Iterable[str]
    exclude: str | Iterable[str]
    round_to: int | Literal["auto"]
    ranks: Mapping[str, Ranks | None] | None = None
    evaluate: Evaluate | None = None


def choose(model: nn.Module, budget: Budget, options: Options) -> Plan:
    """Decide the ranks as `plan` does, whose errors these are, without building a network to measure."""
    check_options(options.round_to, options.calibration)
    check_evaluate(budget, options.evaluate)
    check_model(model)
    inputs, calibration = match_example(model, options.example_inputs, options.calibration)
    check_example(inputs)
    discover_sites = partial(_discover, model, inputs, options)
    try:
        sites = discover_sites(options.layers)
    except DiscoveryError as error:
        raise with_dtype_hint(error, model, inputs) from error
    replaceable, adds_bias = sites.replaceable(), calibration is not None

    timer = None
    if options.round_to == "auto" or budget.latency is not None:
        check_constant_sizes(sites, model)
        timer = LayerTimer(model, replaceable, inputs, adds_bias=adds_bias)
    dense = count_costs(model, inputs)
    space_for = partial(
        make_search_space, budget=budget.without_latency(), dense=dense, ranks=options.ranks or {}, adds_bias=adds_bias,
        notes=dense_notes(sites),
    )  # fmt: skip
    # A budget out of reach is refused before calibration. Of the images only the first batch was read, for its size.
    try:
        space = _find_space(partial(space_for, replaceable), budget, timer, options.round_to)
    except BudgetError as error:
        if timer or options.layers != "conv":
            raise
        wider = discover_sites("conv+linear").replaceable()
        raise _with_linear_hint(error, lambda: space_for(wider, int(options.round_to))) from None
    warn_of_tucker_modules(sites)

    measurements = measure(model, list(replaceable.values()), calibration, inputs, agreement=budget.least_agreement)
    check_held_back(budget.least_agreement, measurements.images_held_back)
    candidates = decompose_sites(model, replaceable, space.options, measurements.metrics)
    chosen, limits = choose_ranks(candidates, space.limits), space.limits
    if timer:
        chosen, limits = refine_by_timing(chosen, timer, candidates, limits)
    planned = Plan(
        model_name=type(model).__name__,
        budget=budget,
        sites=sites,
        ranks=chosen.ranks,
        losses=chosen.losses,
        dense_flops=dense[FLOPS],
        flops=chosen.flops,
        dense_params=dense[PARAMS],
        params=chosen.params,
        dense_seconds=timer.dense_nanoseconds / 1e9 if timer else None,
        seconds=chosen.seconds,
        calibration=calibration_label(calibration, inputs),
        round_to=limits.round_to,
        _checksum=checksum(model),
        _limits=limits,
        _candidates=candidates,
        _measurements=measurements,
        _inputs=inputs,
    )
    return find_smallest(planned, model, options.evaluate) if budget.asks_for_quality else planned


def _discover(model: nn.Module, inputs: Inputs, options: Options, layers: str) -> Sites:
    return discover(model, inputs, layers=layers, include=options.include, exclude=options.exclude)


def _find_space(
    space_for: Callable[[int], SearchSpace], budget: Budget, timer: LayerTimer | None, round_to: int | Literal["auto"]
) -> SearchSpace:
    """Return what ranks are chosen from; with times where a timer is given."""
    if timer is None:
        return space_for(int(round_to))
    return with_latency(space_for, budget, timer, round_to)


def _with_linear_hint(error: BudgetError, space_with_linear: Callable[[], object]) -> BudgetError:
    """Return the error, with the other way out where linear layers bring the budget into reach."""
    try:
        space_with_linear()
    except BudgetError:
        return error
    return BudgetError(f'{error} With linear layers, layers="conv+linear", it can be met.')
