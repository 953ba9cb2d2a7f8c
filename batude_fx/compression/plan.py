"""The plan: which sites get which ranks, what that costs, and how a compressed network is built from it."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from batude_fx.budget.budget import Budget
from batude_fx.budget.cost_limits import CostLimits
from batude_fx.calibration.moment_matching import match_moments_
from batude_fx.compression.calibrate import Measurements
from batude_fx.compression.checks import check_model, check_restorable
from batude_fx.compression.rank_search import SiteCandidate, choose_ranks
from batude_fx.compression.sensitivity import Sensitivity, measure_sensitivity
from batude_fx.errors import BudgetError, CalibrationError, QualityWarning, SelectionError
from batude_fx.graph.example_inputs import remember_input_size_
from batude_fx.graph.flops import count_flops, dense_cost, site_cost
from batude_fx.graph.provenance import attach_, checksum
from batude_fx.graph.shared_parts import refuse_shared_parts
from batude_fx.graph.site_table import Sites, add_site_row, describe_ranks, new_site_table, skip_notes
from batude_fx.graph.surgery import replace_modules
from batude_fx.quality.comparison import QualityMeter
from batude_fx.quality.quality import Quality, Restoration, Search
from batude_fx.report.record import LIBRARIES, Record, site_records
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy
from batude_fx.support.numbers import human, milliseconds, percent
from batude_fx.support.progress import track
from batude_fx.support.tables import ShowsTable, set_caption
from batude_fx.support.user_warning import warn_user
from batude_fx.support.versions import library_versions
from batude_fx.tucker.modules import TuckerModule
from batude_fx.tucker.ranks import Ranks

if TYPE_CHECKING:
    from rich.table import Table

ModelT = TypeVar("ModelT", bound=nn.Module)
SEED = 0  # of synthetic images, sampled positions and random output combinations
_STEPS = (0.8, 0.95)  # the least and the most that remains of a plan's flops where a detector chooses too many boxes


@dataclass(frozen=True)
class Plan(ShowsTable):
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
        seconds: The same of the compressed model: measured by `plan`; predicted by `at`, and in the search for a
            quality, where the budget limits it.
        calibration: `"weights only"`, `"synthetic"`, `"synthetic noise"` (no images fit its input) or `"images"`.
        round_to: Multiple of the ranks.
        search: How the smallest model of the quality that the budget asks for was found; None where it asks for none.
        restoration: How the compressed model was taught by the model; None if it was not.
        quality: How close the compressed model's outputs are to the model's, on images that were held back; None where
            nothing was measured, as for weights only, fewer than 40 images, or a plan made by `at`.
    """

    model_name: str
    budget: Budget
    sites: Sites
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
    quality: Quality | None = field(default=None, compare=False, kw_only=True)
    search: Search | None = field(default=None, compare=False, kw_only=True)
    restoration: Restoration | None = field(default=None, compare=False, kw_only=True)
    _checksum: int = field(repr=False, compare=False)  # of the model's parameters
    _limits: CostLimits = field(repr=False, compare=False)
    _candidates: Mapping[str, SiteCandidate] = field(repr=False, compare=False)
    _measurements: Measurements = field(repr=False, compare=False)
    _inputs: Inputs = field(repr=False, compare=False)

    def apply(self, model: ModelT, *, restore: bool = False) -> ModelT:
        """Build the compressed copy of the model that this plan was made for.

        A detector computes its heads for as many boxes as it chooses, and a compressed one may choose more. So where
        sizes depend on values, the flops of the copy are counted, and its ranks are made smaller than planned until it
        meets the budget.

        Args:
            model: The model; it is bit-identical afterwards.
            restore: Whether the model then teaches the copy, for minutes, on the images that the plan was made with.
                The copy is never further from the model than before, on the images that were held back. It trains on
                the device that accelerate chooses, which needs to be installed, and Ctrl-C ends it early.

        Raises:
            SelectionError: When the model lacks a site of the plan.
            CalibrationError: When it is to be restored, and the plan was made with no images, or with too few.
            TrainingError: When it is to be restored, and that fails, or accelerate is not installed.
            UnsupportedError: When a site has another shape, dtype or device than in the plan, the model holds NaN, or
                this is called inside `torch.inference_mode()` or `torch.autocast()`.
            BudgetError: When the copy needs more flops than planned and cannot be made small enough.

        Warns:
            QualityWarning: When a classifier often disagrees with its original on the images that were held back.
        """
        return self.build(model, restore=restore)[0]

    def build(self, model: ModelT, *, restore: bool = False) -> "tuple[ModelT, Plan]":
        """Return what `apply` returns, and the plan with the quality that was measured.

        Raises:
            BatudeError: As `apply`.

        Warns:
            QualityWarning: As `apply`.
        """
        if restore:
            self._check_restorable()
        small, plan = self.construct(model)
        meter = self.quality_meter(model)
        if restore and plan.ranks:
            small, plan = plan._restored(model, small, meter)  # noqa: SLF001 - of another plan
        plan = plan._with_quality(meter, small)  # noqa: SLF001
        measured = checksum(small) if plan.quality else None
        attach_(small, plan.record().model_copy(update={"weights_measured": measured}))
        return small, plan

    def construct(self, model: ModelT) -> "tuple[ModelT, Plan]":
        """Return what `build` returns, but measure nothing and attach no record.

        Raises:
            BatudeError: As `apply`.
        """
        check_model(model)
        if not self.ranks:
            warn_user(
                f"nothing is replaced: the dense {self.model_name} meets the budget, {self.budget}. What is returned "
                "is a copy of it."
            )
        plan, small = self, self._build(model)
        limit = self.budget.limits(self.dense_flops, self.dense_params).flops
        while self.sites.sizes_vary and limit is not None and (count := count_flops(small, self._inputs)) > limit:
            try:
                tighter = plan.flops / self.dense_flops * min(max(limit / count, _STEPS[0]), _STEPS[1])
                plan = replace(plan.at(self.budget.only_costs(flops=tighter)), budget=self.budget, search=self.search)
            except BudgetError as error:
                raise BudgetError(
                    f"fvcore counts {count:,} flops for the compressed {self.model_name}, {limit:,} are allowed: it "
                    "chooses more boxes than the dense one on the same input, and smaller ranks do not make up for "
                    "them. Pass example_inputs= with real images."
                ) from error
            small = plan._build(model)  # noqa: SLF001 - of another plan
        refuse_shared_parts(small, model, self._inputs)
        remember_input_size_(small, self._inputs)
        return small, plan

    def record(self) -> Record:
        """Return what is saved with the network, and shown in its report."""
        return Record(
            model=self.model_name, budget=str(self.budget), calibration=self.calibration, round_to=self.round_to,
            seed=SEED, dense_flops=self.dense_flops, flops=self.flops, dense_params=self.dense_params,
            params=self.params, dense_seconds=self.dense_seconds, seconds=self.seconds, weights=self._checksum,
            quality=self.quality, search=self.search, restoration=self.restoration,
            versions=library_versions(*LIBRARIES),
            sites=site_records(
                self.sites,
                {name: candidate.options for name, candidate in self._candidates.items()},
                self.ranks,
                {name: candidate.spectrum.loss() for name, candidate in self._candidates.items()},
            ),
        )  # fmt: skip

    def _build(self, model: ModelT) -> ModelT:
        layers = dict(model.named_modules())
        if missing := [name for name in self.ranks if name not in layers]:
            raise SelectionError(f"{type(model).__name__} has no site {missing[0]!r}; apply the plan to its own model.")
        matches_moments = bool(self._measurements.batches)
        replacements = {
            name: self._candidates[name].replacement(layers[name], ranks, with_bias=matches_moments)
            for name, ranks in self.ranks.items()
        }
        if matches_moments:
            self._match_moments_(model, replacements)
        return replace_modules(model, replacements)

    def _match_moments_(self, model: nn.Module, replacements: dict[str, TuckerModule]) -> None:
        """Fold into the replacements what gives their outputs the mean and variance that the original's have."""
        training = {part: part.training for module in replacements.values() for part in module.modules()}
        with private_copy(model) as original:
            for name, value in self._measurements.norm_statistics.items():
                original.get_buffer(name).copy_(value)
            small = replace_modules(original, replacements)
            small.eval()
            batches = track(self._measurements.batches, "matching moments")
            match_moments_(original, small, replacements, batches)
        for part, flag in training.items():
            part.training = flag

    def at(self, budget: Budget | float | str) -> "Plan":
        """Plan for another budget from the same measurements: no image is looked at again.

        With `round_to="auto"` the sites keep the options that the budget of this plan left them, so a much smaller
        budget needs a plan of its own.

        Raises:
            BudgetError: As `plan`.
        """
        budget = Budget.parse(budget)
        if budget.asks_for_quality:
            raise BudgetError(f"{budget}: a quality is searched for by `plan`, which measures networks; call it.")
        chosen = choose_ranks(self._candidates, replace(self._limits, budget=budget))
        # The latency model is a line near the limit, so that without a limit it predicts nothing.
        seconds = None if budget.latency is None else chosen.seconds
        return replace(
            self, budget=budget, ranks=chosen.ranks, losses=chosen.losses, flops=chosen.flops, params=chosen.params,
            seconds=seconds, quality=None, search=None, restoration=None,
        )  # fmt: skip

    def measured(self, model: nn.Module) -> "Plan":
        """Return the plan with the quality of its compressed model, where images were held back to measure it.

        Raises:
            BatudeError: As `apply`.

        Warns:
            QualityWarning: As `apply`.
        """
        return self.build(model)[1] if self.ranks and self._measurements.held_back else self

    @property
    def has_held_back(self) -> bool:
        """Whether images were held back, so that quality can be measured."""
        return bool(self._measurements.held_back)

    def quality_meter(self, model: nn.Module) -> QualityMeter:
        """Return what measures the quality of networks that are compressed from the plan's model."""
        return QualityMeter(model, self._measurements.held_back, synthetic=self._measurements.synthetic)

    def _check_restorable(self) -> None:
        """Refuse to restore where there is nothing to teach with, or nothing to show that it helped.

        Raises:
            CalibrationError: As `apply`.
            TrainingError: As `apply`.
        """
        check_restorable(has_images=self.calibration == "images")
        if not self.has_held_back:
            raise CalibrationError(
                "fewer than 40 images were given, too few to hold some back and to see whether restoring helps; give "
                "a hundred or more."
            )
        shapes = {tuple(image.shape) for image in self._measurements.seen}
        if self._inputs.image is None and len(shapes) > 1:
            raise CalibrationError(
                f"inputs of one shape are needed to restore {self.model_name}, and these have {len(shapes)}, such as "
                f"{min(shapes)} and {max(shapes)}."
            )

    def _restored(self, model: nn.Module, small: ModelT, meter: QualityMeter) -> "tuple[ModelT, Plan]":
        """Return the network after its original has taught it, and the plan that says so."""
        from batude_fx.training.restore import restore  # accelerate takes a while to import

        before = meter.measure(small)
        if before is None or before.distance is None:
            raise CalibrationError(f"the outputs of {self.model_name} cannot be compared, so it cannot be restored.")
        small, restoration = restore(model, small, self._measurements.seen, self._inputs, meter, before)
        return small, replace(self, restoration=restoration, quality=None)

    def _with_quality(self, meter: QualityMeter, small: nn.Module) -> "Plan":
        """Return the plan with the quality of its compressed model, and warn where that is low."""
        if self.quality is not None or not self.has_held_back:
            return self
        quality = meter.measure(small)
        if quality and quality.is_low:
            warn_user(f"the compressed {self.model_name} {quality}. {_way_out(quality)}", QualityWarning)
        return replace(self, quality=quality)

    def sensitivity(self, model: nn.Module, *, measured: int = 10) -> Sensitivity:
        """Return what each site alone costs when it is cut, as predicted and as measured.

        Args:
            model: The model that the plan was made for.
            measured: Number of sites, the most expensive ones, that are cut to half of their flops and measured on the
                images that were held back; each takes as long as `apply`. Without such images none is measured.

        Raises:
            BatudeError: As `apply`.
        """
        meter = self.quality_meter(model)

        def quality_with(ranks: Mapping[str, Ranks]) -> Quality | None:
            return meter.measure(replace(self, ranks=ranks)._build(model))  # noqa: SLF001 - of another plan

        measures = quality_with if self.has_held_back else None
        return measure_sensitivity(self.model_name, self._candidates, measures, measured=measured)

    def _table(self) -> "Table":
        return plan_table(self)


def _way_out(quality: Quality) -> str:
    """Return what to do about a low quality."""
    if quality.synthetic:
        return (
            "Calibrate with photos of its task, a hundred or more (calibration=), allow a larger budget, or train it "
            "by a recipe."
        )
    return "Allow a larger budget, calibrate with more images of its task, or train it by a recipe."


def plan_table(plan: Plan) -> "Table":
    """List every site of a plan with its costs before and after and its ranks, and why some stay dense."""
    title = f"{plan.model_name}, budget: {plan.budget}, calibration: {plan.calibration}"
    table = new_site_table(title, plan.sites, "flops", "after", "ranks", "loss")
    for site in plan.sites:
        ranks = plan.ranks.get(site.name)
        after = human(site_cost(site, ranks)[0]) if ranks else ""
        loss = f"{plan.losses[site.name]:.2g}" if ranks else ""
        add_site_row(
            table, site, human(dense_cost(site)[0]), after, describe_ranks(astuple(ranks) if ranks else None), loss
        )
    set_caption(
        table,
        f"{human(plan.dense_flops)}FLOPs to {human(plan.flops)}FLOPs ({percent(plan.flops, plan.dense_flops)}), "
        f"{human(plan.dense_params)} to {human(plan.params)} parameters ({percent(plan.params, plan.dense_params)}); "
        f"{_times_text(plan)}{len(plan.ranks)} of {len(plan.sites)} sites replaced. Ranks are out / in, per group, "
        f"multiples of {plan.round_to}; one multiply-add is one flop. {_quality_text(plan)}{skip_notes(plan.sites)}",
    )
    return table


def _quality_text(plan: Plan) -> str:
    """The part of the caption about quality."""
    if plan.quality:
        found = f" It was {plan.search}." if plan.search else ""
        restored = f" It {plan.restoration}." if plan.restoration else ""
        return f"The compressed network {plan.quality}.{found}{restored}"
    if plan.calibration == "weights only":
        return "Quality was not measured, as no images were given."
    if not plan.has_held_back:
        return "Quality was not measured, as fewer than 40 images were given."
    return "Quality is measured when the plan is applied."


def _times_text(plan: Plan) -> str:
    """The part of the caption about wall time; empty where nothing was timed."""
    if plan.seconds is None or plan.dense_seconds is None:
        return ""
    return (
        f"{milliseconds(plan.dense_seconds)} to {milliseconds(plan.seconds)} ms a run "
        f"(speed-up {plan.dense_seconds / plan.seconds:.2f}x); "
    )
