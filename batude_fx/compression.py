"""The two verbs: `plan` decides the ranks under a budget, `compress` also builds the network that has them."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batude_fx import allocation
from batude_fx.borrowing import borrowed
from batude_fx.budget import Budget
from batude_fx.calibration import (
    SYNTHETIC_DRAWS,
    Images,
    Inputs,
    Keeper,
    image_batches,
    mixed,
    normalized_by,
    running_statistics,
    sees_noise,
    synthetic_batches,
)
from batude_fx.capacity import Account, counted
from batude_fx.choosing import Candidate, choose, settled, timed
from batude_fx.discovery import discover
from batude_fx.errors import BudgetError, CalibrationError, SelectionError, UnsupportedError
from batude_fx.flops import count_flops
from batude_fx.handlers import canonical_weight
from batude_fx.latency import Stopwatch
from batude_fx.matching import match_moments_
from batude_fx.measuring import statistics
from batude_fx.modules import TuckerModule
from batude_fx.progress import track
from batude_fx.record import Record, attach_, checksum, site_records, versions
from batude_fx.sites import ConvSite, Ranks, Sites
from batude_fx.spectra import Metric, metric_spectrum, weight_spectrum
from batude_fx.surgery import copied, refuse_wrappers, replace
from batude_fx.zoo import arguments

ModelT = TypeVar("ModelT", bound=nn.Module)
Calibration = Images | Literal["synthetic"] | None

SEED = 0  # of procedural images, sampled positions and random output combinations
_STEPS = (0.8, 0.95)  # bounds of how fast a plan shrinks where a detector chooses too many boxes


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
        dense_seconds: Wall time of one run of the example input, where the budget limits it or ranks suit the machine.
        seconds: That of the compressed model: measured by `plan`; foreseen by `at` where the budget limits it.
        calibration: `"weights only"`, `"synthetic"`, `"synthetic noise"` (no images fit its input) or `"images"`.
        round_to: Multiple of the ranks.
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
    dense_seconds: float | None
    seconds: float | None
    calibration: str
    round_to: int
    _weights: int = field(repr=False, compare=False)
    _account: Account = field(repr=False, compare=False)
    _candidates: Mapping[str, Candidate] = field(repr=False, compare=False)
    _kept: tuple[Inputs, ...] = field(repr=False, compare=False)
    _norms: Mapping[str, Tensor] = field(repr=False, compare=False)
    _recounted: Inputs | None = field(repr=False, compare=False)

    def apply(self, model: ModelT) -> ModelT:
        """The compressed copy of the model that this plan was made for.

        A detector computes its heads for as many boxes as it chooses, and a compressed one may choose more. So where
        sizes depend on values the copy is counted, and gets smaller ranks than planned until it meets the budget.

        Raises:
            SelectionError: When the model lacks a site of the plan.
            UnsupportedError: When a site has another shape, dtype or device than in the plan, the model holds NaN, or
                this is called inside `torch.inference_mode()` or `torch.autocast()`.
            BudgetError: When the copy needs more flops than planned and cannot be made small enough.
        """
        _check_values(model)
        if not self.ranks:
            warnings.warn(
                f"nothing is replaced: the dense {self.model_name} meets the budget, {self.budget}. What is returned "
                "is a copy of it.",
                stacklevel=2,
            )
        plan, small = self, self._applied(model)
        limit = self.budget.limits(self.dense_flops, self.dense_params).flops
        while self._recounted and limit is not None and (count := count_flops(small, self._recounted)) > limit:
            try:
                tighter = plan.flops / self.dense_flops * min(max(limit / count, _STEPS[0]), _STEPS[1])
                plan = plan.at(self.budget.model_copy(update={"flops": tighter}))
            except BudgetError as error:
                raise BudgetError(
                    f"fvcore counts {count:,} flops for the compressed {self.model_name}, {limit:,} are allowed: it "
                    "chooses more boxes than the dense one on the same input, and smaller ranks do not make up for "
                    "them. Pass example_inputs= with real images."
                ) from error
            small = plan._applied(model)  # noqa: SLF001 - of another plan
        attach_(small, plan.record())
        return small

    def record(self) -> Record:
        """What is saved with the network, and shown in its report."""
        return Record(
            model=self.model_name, budget=str(self.budget), calibration=self.calibration, round_to=self.round_to,
            seed=SEED, dense_flops=self.dense_flops, flops=self.flops, dense_params=self.dense_params,
            params=self.params, dense_seconds=self.dense_seconds, seconds=self.seconds, weights=self._weights,
            versions=versions(),
            sites=site_records(
                self.sites,
                {name: one.options for name, one in self._candidates.items()},
                self.ranks,
                {name: one.spectrum.loss() for name, one in self._candidates.items()},
            ),
        )  # fmt: skip

    def _applied(self, model: ModelT) -> ModelT:
        modules = dict(model.named_modules())
        if missing := [name for name in self.ranks if name not in modules]:
            raise SelectionError(f"{type(model).__name__} has no site {missing[0]!r}; apply the plan to its own model.")
        matched = bool(self._kept)
        modules = {n: self._candidates[n].replacement(modules[n], r, with_bias=matched) for n, r in self.ranks.items()}
        if matched:
            self._match_moments(model, modules)
        return replace(model, modules)

    def _match_moments(self, model: nn.Module, modules: dict[str, TuckerModule]) -> None:
        if self._norms:
            model = copied(model)
            for name, value in self._norms.items():
                model.get_buffer(name).copy_(value)
        training = {part: part.training for module in modules.values() for part in module.modules()}
        with borrowed(model):
            batches = track(self._kept, "matching moments")
            small = replace(model, modules)
            small.eval()
            match_moments_(model, small, modules, batches)
        for part, flag in training.items():
            part.training = flag

    def at(self, budget: Budget | float | str) -> "Plan":
        """The plan for another budget, from the same measurements: no image is looked at again.

        With `round_to="auto"` its sites have the choices that this plan's own budget left them; one that is much
        smaller needs a plan of its own.

        Raises:
            BudgetError: As `plan`.
        """
        budget = Budget.parse(budget)
        choice = choose(self._candidates, replaced(self._account, budget=budget))
        if budget.latency is None:  # the line through what was timed goes by the limit
            choice = replaced(choice, seconds=None)
        return replaced(self, budget=budget, **vars(choice))

    def __str__(self) -> str:
        """The plan as a table."""
        from batude_fx.report import as_text, plan_table

        return as_text(plan_table(self))


def plan(  # noqa: PLR0913 - each one is a question that a user of compress asks
    model: nn.Module,
    budget: Budget | float | str,
    *,
    example_inputs: Tensor | Inputs | None = None,
    calibration: Calibration = "synthetic",
    layers: str = "conv",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    round_to: int | Literal["auto"] = 8,
    ranks: Mapping[str, Ranks | None] | None = None,
) -> Plan:
    """Decide the Tucker-2 ranks of a model under a budget.

    Args:
        model: Any module; it is bit-identical afterwards.
        budget: The fraction of flops that remains (0.5), a factor ("2.5x"), a percentage ("40%"), an absolute count
            ("0.9GFLOPs"), or a `Budget` with several limits, latency among them. Flops are fvcore's: one multiply-add
            is one. Latency is the wall time of the model in eval mode on its device, with torch's threads of now.
        example_inputs: Arguments of one run, (1, C, H, W) for an image model, whose batch and memory format count
            for latency. By default what timm or torchvision knows of the model.
        calibration: Unlabelled images, normalized as for evaluation: a tensor (N, C, H, W), an iterable of batches or
            a DataLoader. "synthetic" generates some; None looks at the weights alone.
        layers: "conv", or "conv+linear" to replace linear layers too.
        include: Globs over qualified names; only sites that match one are replaced.
        exclude: Globs; sites that match one stay dense.
        round_to: Ranks are multiples of this, all groups of a site together. "auto" measures which multiple suits this
            machine, and leaves sites dense that would be no faster, as far as the budget can then be met.
        ranks: Site name to ranks that are fixed beforehand; None keeps a site dense.

    Returns:
        The plan; `print` shows it as a table, `plan.apply(model)` builds the network.

    Raises:
        BudgetError: The budget cannot be read, or is out of reach; then the message names the smallest reachable one.
        DiscoveryError: The model has no convolution, or does not run on the example input.
        SelectionError: A pattern or a name in `ranks` matches no site.
        CalibrationError: The calibration images are empty, not finite or of the wrong shape.
        UnsupportedError: The model is in half precision, on the meta device, or holds NaN; or this is called inside
            `torch.inference_mode()` or `torch.autocast()`.

    Source: ranks by a multiple-choice knapsack, H. Kellerer et al., "Knapsack Problems", 2004, chapter 11; losses by
        R. Grosse, J. Martens, ICML 2016, https://arxiv.org/abs/1602.01407; flops as fvcore's `FlopCountAnalysis`.
    """
    budget = Budget.parse(budget)
    if round_to != "auto" and (type(round_to) is not int or round_to < 1):
        raise SelectionError(f'round_to={round_to!r} is not a rank multiple; use 1 or more, 8 by default, or "auto".')
    if isinstance(calibration, str) and calibration != "synthetic":
        raise CalibrationError(f'calibration={calibration!r}: give images, "synthetic", or None for weights only.')
    _check_values(model)
    inputs = arguments(model, example_inputs)
    sites = discover(model, inputs, layers=layers, include=include, exclude=exclude)
    eligible = sites.replaceable()
    watch = None
    if round_to == "auto" or budget.latency is not None:
        _check_times(sites, model)
        watch = Stopwatch(model, eligible, inputs, adds_bias=calibration is not None)
    dense: tuple[int, ...] = count_flops(model, inputs), sum(parameter.numel() for parameter in model.parameters())
    within = budget.model_copy(update={"latency": None})
    count = partial(counted, budget=within, dense=dense, ranks=ranks or {}, adds_bias=calibration is not None)
    try:  # a budget out of reach is said before any image is looked at
        if watch:
            options, account = timed(partial(count, eligible), budget, watch, round_to)
        else:
            options, account = count(eligible, int(round_to))
    except BudgetError as error:
        if layers != "conv" or watch:
            raise
        wider = discover(model, inputs, layers="conv+linear", include=include, exclude=exclude)
        raise _naming_linear(error, lambda: count(wider.replaceable(), int(round_to))) from None
    measured, kept, norms = _measure(model, list(eligible.values()), calibration, inputs)
    candidates = _candidates(model, eligible, options, measured)
    choice = choose(candidates, account)
    if watch:
        choice, account = settled(choice, watch, candidates, account)
    return Plan(
        model_name=type(model).__name__,
        budget=budget,
        sites=sites,
        dense_flops=dense[0],
        dense_params=dense[1],
        dense_seconds=watch.dense_nanoseconds / 1e9 if watch else None,
        calibration=_label(calibration, inputs),
        round_to=account.round_to,
        **vars(choice),
        _weights=checksum(model),
        _account=account,
        _candidates=candidates,
        _kept=kept,
        _norms=norms,
        _recounted=inputs if sites.sizes_vary else None,
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

    Source: Tucker-2 of convolutions, Y.-D. Kim et al., ICLR 2016, https://arxiv.org/abs/1511.06530.
    """
    return plan(model, budget, **options).apply(model)


def _check_values(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{model!r} is no model; batude_fx.create makes one from a name.")
    if torch.is_inference_mode_enabled():
        raise UnsupportedError(
            "inside torch.inference_mode() calibration gets no gradients, and the result could never be trained; call "
            "compress outside. torch.no_grad() is no hindrance."
        )
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise UnsupportedError(
            "inside torch.autocast() weights would be decomposed in half precision; compress outside."
        )
    refuse_wrappers(model, "compress")
    # Of those that are not initialized yet, discovery has more to say.
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name in [name for name, one in parameters.items() if not is_lazy(one)]:
        parameter = parameters[name]
        if parameter.is_meta:
            raise UnsupportedError(f"{name} is on the meta device and has no values; load the weights first.")
        if parameter.is_inference():
            raise UnsupportedError(
                f"{name} was made inside torch.inference_mode(), without gradients; make it outside."
            )
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:  # noqa: PLR2004 - bytes of float32
            raise UnsupportedError(
                f"{name} is {parameter.dtype}, too coarse to decompose; compress model.float(), "
                f"then convert the result back with .to({parameter.dtype})."
            )
        if not parameter.isfinite().all():
            raise UnsupportedError(f"{name} holds NaN or infinite values; load other weights.")


def _naming_linear(error: BudgetError, count: Callable[[], object]) -> BudgetError:
    """The error, and the other way out where the budget is in reach with linear layers."""
    try:
        count()
    except BudgetError:
        return error
    return BudgetError(f'{error} With linear layers, layers="conv+linear", it can be met.')


def _label(calibration: Calibration, inputs: Inputs) -> str:
    if calibration is None:
        return "weights only"
    if not isinstance(calibration, str):
        return "images"
    return "synthetic noise" if sees_noise(inputs) else "synthetic"


def _measure(
    model: nn.Module, sites: Sequence[ConvSite], calibration: Calibration, inputs: Inputs
) -> tuple[dict[str, Metric], tuple[Inputs, ...], dict[str, Tensor]]:
    """The metric of every site, and what the compressed network is matched on: batches, and batch-norm statistics."""
    if calibration is None or not sites:
        return {}, (), {}
    procedural = Keeper(synthetic_batches(model, inputs))
    if isinstance(calibration, str):
        metrics, norms = _synthetic(model, sites, procedural, draws=SYNTHETIC_DRAWS)
        return metrics, tuple(procedural.kept), norms
    own = Keeper(track(image_batches(calibration, inputs), "calibrating"))
    metrics = statistics(model, sites, own)
    if not sees_noise(inputs):  # a few images are not all that there is, but noise tells nothing of the rest
        metrics = mixed(metrics, _synthetic(model, sites, procedural, draws=1)[0])
    return metrics, tuple(own.kept), {}


def _synthetic(
    model: nn.Module, sites: Sequence[ConvSite], procedural: Keeper, *, draws: int
) -> tuple[dict[str, Metric], dict[str, Tensor]]:
    """Metrics of a network whose batch-norms know these images, and their statistics."""
    batches = list(procedural)
    shown = track(batches, "calibrating, synthetic images")
    adapted = normalized_by(model, batches)
    return statistics(adapted, sites, shown, draws=draws), running_statistics(adapted)


def _candidates(
    model: nn.Module,
    sites: Mapping[str, ConvSite],
    options: Mapping[str, allocation.Options],
    measured: Mapping[str, Metric],
) -> dict[str, Candidate]:
    names = track(list(sites), "decomposing")
    return {name: _candidate(model, sites[name], options[name], measured.get(name)) for name in names}


def _candidate(model: nn.Module, site: ConvSite, options: allocation.Options, measured: Metric | None) -> Candidate:
    weight = canonical_weight(model.get_submodule(site.name))
    spectrum = metric_spectrum(measured) if measured else weight_spectrum(weight, pointwise=site.is_pointwise)
    return Candidate(site, options.judged(spectrum.loss()), spectrum)


def _check_times(sites: Sites, model: nn.Module) -> None:
    if sites.sizes_vary:
        raise UnsupportedError(
            f"{type(model).__name__} may compute more or less for other values, so its time cannot be foreseen; give "
            "flops or params, and a number for round_to."
        )
