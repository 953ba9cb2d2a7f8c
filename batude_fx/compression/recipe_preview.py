"""What a dry run shows of a recipe, without images or training: whether the budget can be met, and the schedule."""

from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Group

from batude_fx.budget.rank_options import FLOPS
from batude_fx.compression.plan import Plan
from batude_fx.compression.planning import plan
from batude_fx.graph.flops import count_flops
from batude_fx.support.numbers import human, percent
from batude_fx.support.tables import add_row, new_table
from batude_fx.training.problem import Problem, dense_network
from batude_fx.training.recipe import OneShot, Recipe

_STEPS = 1000  # steps per epoch; the true number depends on the images, but is not needed for shares of an epoch


@dataclass(frozen=True)
class Preview:
    """The plan and the schedule of a run.

    Attributes:
        plan: Ranks for randomly initialized weights. They show that the budget can be met; training will find others.
        flops: Flops of the network at these ranks, as fvcore counts them.
        rounds: Of every round of BC-ADL, its start in the unit of the phase's length, the share of the flops that
            remains, and rho. Empty if the rounds have another unit than the phase, as the number of steps in an epoch
            is not known without the images.
    """

    plan: Plan = field(repr=False)
    flops: int
    rounds: list[tuple[float, float, float]]

    def facts(self) -> dict[str, Any]:
        """Return the figures as values for JSON."""
        return {
            "model": self.plan.model_name, "dense_flops": self.plan.dense_flops, "flops": self.flops,
            "factor": self.plan.dense_flops / self.flops, "sites": len(self.plan.sites), "rounds": self.rounds,
        }  # fmt: skip


def preview(recipe: Recipe) -> Preview:
    """Build the network of a recipe with random weights, plan it for the budget, and count its flops.

    Raises:
        RecipeError: When there is no such network, or its budget is out of reach.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = dense_network(recipe, weights=False)
    problem, settings = Problem.of(model, recipe), recipe.one_shot
    random_plan = plan(
        model, recipe.budget, example_inputs=problem.inputs, calibration=None, layers=settings.layers,
        include=settings.include, exclude=settings.exclude, round_to=settings.round_to,
    )  # fmt: skip
    flops = count_flops(random_plan.apply(model), problem.inputs)
    return Preview(random_plan, flops, _rounds(settings, keep=flops / problem.dense_costs[FLOPS]))


def _rounds(settings: OneShot, keep: float) -> list[tuple[float, float, float]]:
    """Return the start of each round, the share of the flops that remains, and rho; see `Preview.rounds`."""
    unit = settings.epochs.unit
    if settings.interval.unit not in {unit, "%"}:
        return []
    scale = _STEPS if unit == "epochs" else 1
    return [
        (entry.first_step / scale, 1 - entry.reduction * (1 - keep), entry.rho) for entry in settings.rounds(_STEPS)
    ]


def schedule_table(recipe: Recipe, preview: Preview) -> Group:
    """Return tables of the phases of a recipe and of the rounds of its one-shot training."""
    phases = new_table("phase", "length", "optimizer", "lr", "schedule", "distillation", title="schedule")
    for name in ("pretrain", "one_shot", "finalize"):
        phase = getattr(recipe, name)
        if phase:
            teacher = getattr(phase, "distillation", None)
            distillation = f"{teacher.weight:g}, T = {teacher.temperature:g}" if teacher else "-"
            warmup = f", warm-up {phase.warmup}" if phase.warmup.amount else ""
            schedule = f"{phase.scheduler}{warmup}"
            add_row(phases, name, str(phase.epochs), phase.optimizer, f"{phase.lr:g}", schedule, distillation)
    summary = (
        f"fvcore counts {human(preview.flops)}FLOPs of {human(preview.plan.dense_flops)}FLOPs, "
        f"{preview.plan.dense_flops / preview.flops:.3f} times fewer. The ranks are those of random weights: they "
        "show that the budget can be met; training will find others. Nothing was trained."
    )
    if not preview.rounds:
        length = f"A round of one_shot takes {recipe.one_shot.interval}; how many there are depends on the images."
        phases.caption = f"{length} {summary}"
        return Group(phases)
    unit = recipe.one_shot.epochs.unit.removesuffix("s")
    rounds = new_table("round", f"from {unit}", "flops that remain", "rho", title="rounds of one_shot")
    for index, (epoch, keep, rho) in enumerate(preview.rounds):
        add_row(rounds, str(index), f"{epoch:g}", percent(keep, 1), f"{rho:.2g}")
    rounds.caption = summary
    return Group(phases, rounds)
