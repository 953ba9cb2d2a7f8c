"""What a recipe would do, without data, weights or training: its network, whether the budget holds, its schedule."""

from dataclasses import dataclass, field
from typing import Any

import torch

from batude_fx.compression.plan import Plan
from batude_fx.compression.planning import plan
from batude_fx.graph.flops import count_flops
from batude_fx.training.problem import Problem, dense_network
from batude_fx.training.recipe import Recipe

_STEPS = 1000  # of an epoch, whose true length needs the data; only its parts are shown


@dataclass(frozen=True)
class Preview:
    """What lies ahead.

    Attributes:
        plan: Ranks for weights as they are initialized: they show that the budget can be met, training finds others.
        flops: Of the network at these ranks, counted by fvcore.
        rounds: Where it begins, in the unit of the phase's length, share of the flops that remains, and rho, of every
            round of BC-ADL; empty where the interval has another unit, as the images say how many steps an epoch has.
    """

    plan: Plan = field(repr=False)
    flops: int
    rounds: list[tuple[float, float, float]]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.plan.model_name, "dense_flops": self.plan.dense_flops, "flops": self.flops,
            "factor": self.plan.dense_flops / self.flops, "sites": len(self.plan.sites), "rounds": self.rounds,
        }  # fmt: skip


def preview(recipe: Recipe) -> Preview:
    """Build a recipe's network with fresh weights, plan its budget and count the result.

    Raises:
        RecipeError: There is no such network, or its budget is out of reach.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = dense_network(recipe, weights=False)
    problem, wanted = Problem.of(model, recipe), recipe.one_shot
    decided = plan(
        model, recipe.budget, example_inputs=problem.inputs, calibration=None, layers=wanted.layers,
        include=wanted.include, exclude=wanted.exclude, round_to=wanted.round_to,
    )  # fmt: skip
    flops = count_flops(decided.apply(model), problem.inputs)
    keep = flops / problem.dense[0]
    unit = wanted.epochs.unit
    ahead = wanted.rounds(_STEPS) if wanted.interval.unit in {unit, "%"} else []
    scale = _STEPS if unit == "epochs" else 1
    rounds = [(first / scale, 1 - share * (1 - keep), rho) for first, share, rho in ahead]
    return Preview(decided, flops, rounds)
