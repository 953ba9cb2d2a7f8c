"""The two verbs: `plan` decides the ranks under a budget, `compress` also builds the network that has them."""

import warnings
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from dataclasses import replace as replaced
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batude_fx.budget.budget import Budget
from batude_fx.budget.cost_limits import CostLimits
from batude_fx.calibration.images import Inputs
from batude_fx.calibration.moment_matching import match_moments_
from batude_fx.compression.rank_search import SiteCandidate, choose_ranks
from batude_fx.errors import BudgetError, SelectionError, UnsupportedError
from batude_fx.graph.flops import count_flops, dense_cost, site_cost
from batude_fx.graph.provenance import attach_
from batude_fx.graph.site_table import add_site_row, describe_ranks, new_site_table, skip_notes
from batude_fx.graph.sites import ConvSite
from batude_fx.graph.surgery import copy_model, refuse_wrappers, replace_modules
from batude_fx.report.record import Record, site_records
from batude_fx.support.model_state import eval_and_restore
from batude_fx.support.numbers import human, milliseconds, percent
from batude_fx.support.progress import track
from batude_fx.support.tables import set_caption
from batude_fx.support.versions import library_versions
from batude_fx.tucker.modules import TuckerModule
from batude_fx.tucker.ranks import Ranks

if TYPE_CHECKING:
    from rich.table import Table

ModelT = TypeVar("ModelT", bound=nn.Module)
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
    _account: CostLimits = field(repr=False, compare=False)
    _candidates: Mapping[str, SiteCandidate] = field(repr=False, compare=False)
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
        check_values(model)
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
            versions=library_versions("fvcore", "safetensors"),
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
        return replace_modules(model, modules)

    def _match_moments(self, model: nn.Module, modules: dict[str, TuckerModule]) -> None:
        if self._norms:
            model = copy_model(model)
            for name, value in self._norms.items():
                model.get_buffer(name).copy_(value)
        training = {part: part.training for module in modules.values() for part in module.modules()}
        with eval_and_restore(model):
            batches = track(self._kept, "matching moments")
            small = replace_modules(model, modules)
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
        choice = choose_ranks(self._candidates, replaced(self._account, budget=budget))
        if budget.latency is None:  # the line through what was timed goes by the limit
            choice = replaced(choice, seconds=None)
        return replaced(self, budget=budget, **vars(choice))

    def __str__(self) -> str:
        """The plan as a table."""
        from batude_fx.compression.plan import plan_table
        from batude_fx.support.tables import as_text

        return as_text(plan_table(self))


def check_values(model: object) -> None:
    """Refuse what cannot be compressed: no model, no values, half precision, NaN, or a mode of torch in the way.

    Raises:
        UnsupportedError: With the reason and the way out.
    """
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


def plan_table(plan: "Plan") -> "Table":
    """Every site of a plan with what it costs before and after and its ranks, and why some stay dense."""
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
        f"{_times(plan)}{len(plan.ranks)} of {len(plan.sites)} sites replaced. Ranks are out / in, per group, "
        f"multiples of {plan.round_to}; one multiply-add is one flop.{skip_notes(plan.sites)}",
    )
    return table


def _times(plan: "Plan") -> str:
    if plan.seconds is None or plan.dense_seconds is None:
        return ""
    return (
        f"{milliseconds(plan.dense_seconds)} to {milliseconds(plan.seconds)} ms a run "
        f"(speed-up {plan.dense_seconds / plan.seconds:.2f}x); "
    )
