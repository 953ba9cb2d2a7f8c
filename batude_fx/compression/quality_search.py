"""Find the smallest network that still has the quality that a budget asks for, without calibrating again.

Each trial halves the range of flops in which the smallest network lies: a plan for its middle is made from the same
measurements, and its network is built and measured.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import cast

from torch import Tensor, nn

from batude_fx.budget.budget import Budget
from batude_fx.compression.plan import Plan
from batude_fx.errors import BudgetError, SelectionError
from batude_fx.quality.quality import Search, Trial
from batude_fx.support.model_state import deep_copy
from batude_fx.support.numbers import fewest_trials, human, wilson_interval

_MOST_TRIALS = 8
_CLOSE = 0.01  # of the flops: near enough to stop
Evaluate = Callable[[nn.Module], float]
"""A user's own measure of a network, the larger the better."""


@dataclass(frozen=True)
class _Goal:
    """What a network must reach.

    Attributes:
        name: What the budget calls it.
        least: What its bound must reach.
        measure: Returns the value of a network and its bound.
    """

    name: str
    least: float
    measure: Callable[[nn.Module], tuple[float, float]]


def find_smallest(plan: Plan, model: nn.Module, evaluate: Evaluate | None) -> Plan:
    """Return the plan of the smallest network that has the quality which the plan's budget asks for.

    Args:
        plan: The plan of the largest network that the limits of the budget allow.
        model: The model that it was made for.
        evaluate: Measures a network, for a budget that asks for a score or limits its drop.

    Raises:
        BudgetError: When no network within the limits has the quality, with the best that was found.
        SelectionError: When `evaluate` returns no finite number.
    """
    goal = _goal(plan, model, evaluate)
    trials: list[Trial] = []

    def reaches(candidate: Plan) -> bool:
        small, built = candidate.construct(model)
        value, bound = goal.measure(small)
        trials.append(Trial(flops=built.flops, value=value, bound=bound))
        return bound >= goal.least

    low, high, best = 0.0, plan.flops / plan.dense_flops, plan
    if plan.ranks and not reaches(plan):
        raise _out_of_reach(goal, plan, trials)
    while len(trials) < _MOST_TRIALS and high - low > _CLOSE * high:
        middle = (low + high) / 2
        try:
            candidate = plan.at(plan.budget.only_costs(flops=middle))
        except BudgetError:  # no ranks are so small
            low = middle
            continue
        if reaches(candidate):
            best, high = candidate, candidate.flops / plan.dense_flops
        else:
            low = middle
    if not best.ranks:
        raise _out_of_reach(goal, plan, trials)
    return replace(best, budget=plan.budget, search=Search(target=goal.name, least=goal.least, trials=tuple(trials)))


def check_evaluate(budget: Budget, evaluate: Evaluate | None) -> None:
    """Refuse a budget that asks for a score without the function that measures it, and such a function without a use.

    Raises:
        SelectionError: With the way out.
    """
    asks_for_score = (budget.score, budget.max_drop) != (None, None)
    if asks_for_score and evaluate is None:
        raise SelectionError("a score needs evaluate=, a function from a network to its score, the larger the better.")
    if evaluate is not None and not callable(evaluate):
        raise SelectionError(f"evaluate={evaluate!r} is no function; give one from a network to its score.")
    if not asks_for_score and evaluate is not None:
        raise SelectionError("evaluate= has no use without Budget(score=...) or Budget(max_drop=...).")


def _goal(plan: Plan, model: nn.Module, evaluate: Evaluate | None) -> _Goal:
    budget = plan.budget
    if budget.least_agreement is not None:
        return _agreement_goal(plan, model, budget.least_agreement)

    def measure(network: nn.Module) -> tuple[float, float]:
        returned: object = evaluate(network.eval()) if evaluate else None
        value = returned.item() if isinstance(returned, Tensor) and returned.numel() == 1 else returned
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise SelectionError(f"evaluate returned {str(returned)[:80]!r}, which is no score; return a number.")
        return float(value), float(value)

    original, _ = measure(deep_copy(model, {}))  # evaluate may train what it is given
    if budget.max_drop is not None:
        return _Goal("max_drop", original - budget.max_drop, measure)
    least = cast("float", budget.score)
    if original < least:
        raise BudgetError(f"{budget}: the original itself reaches {original:.4g} only. Ask for less.")
    return _Goal("score", least, measure)


def check_held_back(asked: float | None, images: int) -> None:
    """Refuse an agreement that so few images cannot show.

    Args:
        asked: The agreement that is asked for; None where none is.
        images: Number of images that are held back.

    Raises:
        BudgetError: With the number that is needed.
    """
    if asked is None:
        return
    needed = 2 * fewest_trials(asked)
    if not images:
        raise BudgetError(
            f"an agreement of {asked:g} cannot be measured: no images are held back. Calibrate with {needed} images or "
            "more."
        )
    if (highest := wilson_interval(images, images)[0]) < asked:
        raise BudgetError(
            f"{images} images are held back, too few to show an agreement of {asked:g}: where a network agrees "
            f"on all of them, the 95 % interval begins at {highest:.3f}. Give {needed} images, of which "
            "half is held back, or ask for less."
        )


def _agreement_goal(plan: Plan, model: nn.Module, least: float) -> _Goal:
    meter = plan.quality_meter(model)

    def measure(network: nn.Module) -> tuple[float, float]:
        quality = meter.measure(network)
        if quality is None or quality.agreement is None:
            raise BudgetError(
                f"{plan.model_name} is no classifier, so there is no agreement; use Budget(score=...) and evaluate=."
            )
        return quality.agreement.value, quality.agreement.interval[0]

    return _Goal("agreement", least, measure)


def _out_of_reach(goal: _Goal, plan: Plan, trials: list[Trial]) -> BudgetError:
    found = "nothing can be replaced"
    if trials:
        best = max(trials, key=lambda trial: trial.bound)
        tried = f"the best of {len(trials)} networks" if len(trials) > 1 else "the largest one within the other limits"
        found = f"{tried}, of {human(best.flops)}FLOPs, reaches {best.bound:.4g}"
        if best.bound != best.value:
            found += f", the lower end of the 95 % interval of {best.value:.4g}"
    return BudgetError(
        f"{plan.budget}: no smaller network reaches {goal.least:.4g}; {found}. Ask for less, calibrate with more "
        "images of its task, or train it by a recipe."
    )
