"""One calibration, many budgets: how good and how fast the network is at each of them."""

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median

from torch import Tensor, nn

from batude_fx.compression.plan import Plan
from batude_fx.errors import BudgetError, UnsupportedError
from batude_fx.evaluation import scores
from batude_fx.report.sweep_points import Point

_FORMS = "Write 0.3:0.9:0.1 (first, last, step) or 0.3,0.5,0.75."
_MOST = 100  # budgets of one sweep
_RUNS = 10  # timed, of each network
_SLACK = 1e-9


def parse_budgets(text: str) -> list[float]:
    """Read the budgets of a sweep: "0.3:0.9:0.1", last included, or "0.3,0.5,0.75"; sorted.

    Raises:
        BudgetError: When they cannot be read, lie outside (0, 1), or are too many.
    """
    try:
        numbers = [float(part) for part in re.split("[:,]", text)]
    except ValueError:
        raise BudgetError(f"budgets {text!r} cannot be read. {_FORMS}") from None
    if ":" in text:
        if "," in text or len(numbers) != 3 or not numbers[2] > 0 or not numbers[0] <= numbers[1]:  # noqa: PLR2004
            raise BudgetError(f"budgets {text!r}: a range needs first, last and a step above 0. {_FORMS}")
        first, last, step = numbers
        count = min((last - first) / step + _SLACK, _MOST)
        numbers = [round(first + index * step, 6) for index in range(int(count) + 1)]
    if outside := [number for number in numbers if not 0 < number < 1]:
        raise BudgetError(f"budgets {text!r}: {outside[0]:g} is outside (0, 1), the fraction that remains. {_FORMS}")
    if len(numbers) > _MOST:
        raise BudgetError(f"budgets {text!r} are more than {_MOST}. Take a larger step.")
    return sorted(set(numbers))


def plan_tightest(decide: Callable[[float], Plan], budgets: Sequence[float]) -> Plan:
    """The plan for the smallest budget in reach.

    Where ranks suit the machine, what sites can be is settled for a budget: these choices serve all larger ones too,
    though a plan of their own might have had coarser ranks.

    Raises:
        BudgetError: When none is in reach.
    """
    *tight, loosest = budgets
    for budget in tight:
        with suppress(BudgetError):
            return decide(budget)
    return decide(loosest)


def sweep(model: nn.Module, plan: Plan, budgets: Sequence[float], photos: scores.Photos) -> list[Point]:
    """Compress to every budget from the measurements of one plan, and try the result on images.

    Args:
        model: The one that the plan was made for, a classifier of images.
        plan: For any budget.
        budgets: Fractions of the flops that may remain.
        photos: With a subfolder per class there is accuracy, too.

    Returns:
        A point for each budget in reach, and last the original network's.

    Raises:
        BudgetError: When none is in reach; before any image is looked at.
        UnsupportedError: When the model is no classifier.
        CalibrationError: When a file cannot be read.

    Warns:
        UserWarning: When a budget is out of reach, or there are not as many subfolders as the model has classes, so
            that there is no accuracy.
    """
    plans, budgets = _in_reach(plan, budgets)
    original = scores.logits(model, photos.paths)  # (N, classes)
    try:
        truth = photos.labels(original.shape[1])
    except UnsupportedError as error:  # the agreement is worth having without
        warnings.warn(f"{error}.", stacklevel=2)
        truth = None
    tried, dense = [], []
    for one in plans:  # one network at a time, as memory goes
        small = one.apply(model)
        taken, beside = scores.milliseconds([small, model], runs=_RUNS)
        tried.append((one.flops, one.params, taken / beside, scores.logits(small, photos.paths)))
        dense.append(beside)
    tried.append((plan.dense_flops, plan.dense_params, 1.0, original))
    usual = median(dense)  # the machine may have been busier at one budget than at another
    return [
        Point(budget, flops, params, share * usual, scores.agreement(outputs, original), *_accuracy(outputs, truth))
        for budget, (flops, params, share, outputs) in zip([*budgets, 1.0], tried, strict=True)
    ]


def _in_reach(plan: Plan, budgets: Sequence[float]) -> tuple[list[Plan], list[float]]:
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
        warnings.warn(f"left out: {', '.join(errors)}, as the {largest}", stacklevel=3)
    return list(plans.values()), list(plans)


def _accuracy(outputs: Tensor, truth: Sequence[int] | None) -> tuple[float, ...]:
    return () if truth is None else scores.top1_and_top5(outputs, truth)
