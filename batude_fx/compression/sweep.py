"""Compress a network to many budgets after one calibration, and evaluate it at each of them."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median

from torch import Tensor, nn

from batude_fx.compression.plan import Plan
from batude_fx.errors import BudgetError, UnsupportedError
from batude_fx.evaluation import scores
from batude_fx.report.sweep_points import Point
from batude_fx.support.user_warning import warn_user

_FORMS = "Write 0.3:0.9:0.1 (first, last, step) or 0.3,0.5,0.75."
_MOST_BUDGETS = 100
_RUNS = 10  # timed runs of each network
_ROUNDING = 1e-9  # allowance for rounding errors in (last - first) / step


def parse_budgets(text: str) -> list[float]:
    """Return the sorted budgets that a text gives: "0.3:0.9:0.1" (first, last, step) or "0.3,0.5,0.75".

    The last budget of a range is included.

    Raises:
        BudgetError: When the text cannot be read, a budget is outside (0, 1), or there are more than 100.
    """
    try:
        numbers = [float(part) for part in re.split("[:,]", text)]
    except ValueError:
        raise BudgetError(f"budgets {text!r} are not numbers. {_FORMS}") from None
    if ":" in text:
        if "," in text or len(numbers) != 3 or not numbers[2] > 0 or not numbers[0] <= numbers[1]:  # noqa: PLR2004
            raise BudgetError(f"budgets {text!r}: a range needs first, last and a step above 0. {_FORMS}")
        first, last, step = numbers
        steps = min((last - first) / step + _ROUNDING, _MOST_BUDGETS)
        numbers = [round(first + index * step, 6) for index in range(int(steps) + 1)]
    if outside := [number for number in numbers if not 0 < number < 1]:
        raise BudgetError(f"budgets {text!r}: {outside[0]:g} is outside (0, 1), the fraction that remains. {_FORMS}")
    if len(numbers) > _MOST_BUDGETS:
        raise BudgetError(f"budgets {text!r} are more than {_MOST_BUDGETS}. Take a larger step.")
    return sorted(set(numbers))


def plan_tightest(plan_for: Callable[[float], Plan], budgets: Sequence[float]) -> Plan:
    """Return the plan for the smallest budget that can be met.

    With ranks that suit the machine, a plan has rank options that were chosen for its budget. Those for the smallest
    budget serve all larger ones too, although a plan made for a larger one might have had coarser ranks.

    Args:
        plan_for: Makes the plan for a budget.
        budgets: Sorted budgets.

    Raises:
        BudgetError: When no budget can be met.
    """
    *tight, loosest = budgets
    for budget in tight:
        with suppress(BudgetError):
            return plan_for(budget)
    return plan_for(loosest)


def sweep(model: nn.Module, plan: Plan, budgets: Sequence[float], photos: scores.Photos) -> list[Point]:
    """Compress a network to every budget from the measurements of one plan, and evaluate the results on images.

    Args:
        model: The network that the plan was made for, a classifier of images.
        plan: Its plan for any budget.
        budgets: Fractions of the flops that may remain.
        photos: Images to evaluate on; a subfolder per class gives accuracy, too.

    Returns:
        A point for each budget that can be met; the last point is the original network.

    Raises:
        BudgetError: When no budget can be met; raised before the networks are evaluated.
        UnsupportedError: When the model is no classifier.
        CalibrationError: When a file cannot be read as an image.

    Warns:
        UserWarning: When a budget cannot be met, or there are not as many subfolders as the model has classes, so
            that there is no accuracy.
    """
    plans = _plans_within_reach(plan, budgets)
    original = scores.logits(model, photos.paths)  # (N, classes)
    try:
        truth = photos.labels(original.shape[1])
    except UnsupportedError as error:  # agreement needs no labels
        warn_user(f"{error}.")
        truth = None
    results, original_times = [], []
    for budget, plan_at_budget in plans.items():  # one compressed network in memory at a time
        small, _ = plan_at_budget.construct(model)
        small_time, original_time = scores.milliseconds([small, model], runs=_RUNS)
        outputs = scores.logits(small, photos.paths)
        results.append((budget, plan_at_budget.flops, plan_at_budget.params, small_time / original_time, outputs))
        original_times.append(original_time)
    results.append((1.0, plan.dense_flops, plan.dense_params, 1.0, original))
    # The machine may be busier at one budget than at another. Only times that were measured in turns are compared: the
    # ratio of each, times one time of the original for all.
    milliseconds = median(original_times)
    return [
        Point(budget, flops, params, ratio * milliseconds, scores.agreement(outputs, original), *_top(outputs, truth))
        for budget, flops, params, ratio, outputs in results
    ]


def _plans_within_reach(plan: Plan, budgets: Sequence[float]) -> dict[float, Plan]:
    """Return the plan for each budget that can be met, and warn of the others."""
    plans, errors = {}, {}
    for budget in budgets:
        try:
            plans[budget] = plan.at(budget)
        except BudgetError as error:
            errors[f"{budget:g}"] = error
    if errors:
        *_, largest = errors.values()
        if not plans:
            raise largest
        warn_user(f"left out: {', '.join(errors)}, as the {largest}")
    return plans


def _top(outputs: Tensor, truth: Sequence[int] | None) -> tuple[float, ...]:
    return () if truth is None else scores.top1_and_top5(outputs, truth)
