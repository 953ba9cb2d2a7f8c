"""The budget of a compressed network, read from what the user wrote: `0.5`, `"2.5x"`, `"0.9GFLOPs"`, `"12ms"`."""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from batude_fx.errors import BudgetError
from batude_fx.support.validation import first_mistake

_FORMS = 'a fraction that remains (0.5), a factor ("2.5x"), a percentage ("40%") or an absolute'
_ABSOLUTE = {
    "flops": 'count ("0.9GFLOPs")', "params": 'count ("12MParams")', "latency": 'time ("12ms"; s, ms, us or ns)'
}  # fmt: skip
_QUALITY_FORMS = {
    "agreement": 'a share of the images, 0.98 or "98%"', "score": "a number, which the value of evaluate= must reach",
    "max_drop": "a number from 0 on, by which the value of evaluate= may fall",
}  # fmt: skip
_NUMBER = r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)"
_MOST = 2**62  # a count is never larger, so that it fits into an integer of 64 bits
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS = {"flop": r"([kmgt]?)flops?", "param": r"([kmgt]?)params?", "latency": r"(ns|us|ms|s)"}
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


def _keep_or_count(text: str, unit: str) -> tuple[float | None, int | None]:
    """Read one limit as (fraction that remains, absolute count), of which exactly one is not None."""
    text = text.strip().lower()
    if match := re.fullmatch(rf"{_NUMBER}x", text):
        return (1 / factor if (factor := float(match[1])) > 0 else math.inf), None
    if match := re.fullmatch(rf"{_NUMBER}\s*%", text):
        return float(match[1]) / 100, None
    if match := re.fullmatch(rf"{_NUMBER}\s*{_UNITS[unit]}", text):
        return None, int(min(float(match[1]) * (_SCALES | _NANOSECONDS)[match[2]], _MOST))
    if re.fullmatch(rf"-?{_NUMBER}", text):
        return float(text), None
    raise ValueError(f"cannot read {text!r}")


def _check_limit(limit: float | str | None, unit: str) -> float | str | None:
    """Return the limit as it is, once it is known to be readable and to lie in its range."""
    if limit is None:
        return None
    keep, count = _keep_or_count(str(limit), unit)
    if keep is not None and not 0 < keep < 1:
        raise ValueError(
            f"{limit!r} keeps {keep:g} of the {unit if unit == 'latency' else f'{unit}s'}; "
            f"the fraction that remains must be inside (0, 1){_meant(str(limit), keep)}"
        )
    if count is not None and count <= 0:
        raise ValueError(f"{limit!r} is not a positive count")
    return limit


def _share(limit: float | str) -> float:
    """Return a share that is written as a number or a percentage; NaN for anything else."""
    match = re.fullmatch(rf"{_NUMBER}\s*(%?)", str(limit).strip())
    return float(match[1]) / (100 if match[2] else 1) if match else math.nan


def _check_share(limit: float | str | None) -> float | str | None:
    """Return the agreement as it is, once it is known to be a share."""
    if limit is not None and not 0 < _share(limit) < 1:
        raise ValueError(f"{limit!r} is no share of the images inside (0, 1)")
    return limit


def _meant(limit: str, keep: float) -> str:
    """Return what a plain number above 1 may have been meant as; empty for other limits."""
    if not re.fullmatch(_NUMBER, limit.strip()) or not 1 < keep < 100:  # noqa: PLR2004 - percent
        return ""
    return f'; "{keep:g}%" keeps {keep:g} percent, and "{keep:g}x" is a factor'


def _advice(name: str) -> str:
    """Return what to write for a limit; empty where the mistake is not in one of them."""
    if name in _QUALITY_FORMS:
        return f"Write {_QUALITY_FORMS[name]}."
    if name in _ABSOLUTE:
        return f"Write {_FORMS} {_ABSOLUTE[name]}."
    return f"The limits are {', '.join((*_ABSOLUTE, *_QUALITY_FORMS))}." if name else ""


class Budget(BaseModel):
    """Limits on the whole compressed model; all of them hold at once.

    Attributes:
        flops: Multiply-adds of one run of the example input, as fvcore counts them: a fraction that remains (0.5),
            a factor ("2.5x"), a percentage ("40%") or an absolute count ("0.9GFLOPs").
        params: Parameters, in the same forms; absolute counts are written "12MParams".
        latency: Wall time of one run of the example input, measured on this machine, in the same forms; absolute times
            are written "12ms".
        agreement: Share of the images, held back from calibration, for which the compressed model must give the
            original's top class: 0.98 or "98%". The lower end of the share's 95 % interval counts.
        score: Least value of the `evaluate` function that is given to `plan` or `compress`.
        max_drop: Most that the value of `evaluate` may be below that of the original.

    At most one of the last three is given. The smallest model that reaches it is then searched for.

    Raises:
        BudgetError: When there is no limit, or one cannot be read or lies outside (0, 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    flops: Annotated[float | str | None, AfterValidator(partial(_check_limit, unit="flop"))] = None
    params: Annotated[float | str | None, AfterValidator(partial(_check_limit, unit="param"))] = None
    latency: Annotated[float | str | None, AfterValidator(partial(_check_limit, unit="latency"))] = None

    agreement: Annotated[float | str | None, AfterValidator(_check_share)] = None
    score: float | None = None
    max_drop: Annotated[float | None, Field(ge=0)] = None

    def __init__(self, **limits: float | str | None) -> None:
        try:
            super().__init__(**limits)
        except ValidationError as error:
            mistake = first_mistake(error)
            name = mistake.path[0] if mistake.path else ""
            limit = f" {name}={limits[name]!r}" if name else ""
            raise BudgetError(f"budget{limit}: {mistake.reason.rstrip('.')}. {_advice(name)}".rstrip()) from None

    @model_validator(mode="after")
    def _some_limit(self) -> "Budget":
        if all(limit is None for _, limit in self):
            raise ValueError("no limit given; set flops, params, latency or agreement")
        if sum(limit is not None for limit in (self.agreement, self.score, self.max_drop)) > 1:
            raise ValueError("agreement, score and max_drop exclude each other; give one")
        return self

    @classmethod
    def parse(cls, budget: "Budget | float | str") -> "Budget":
        """Read what the user wrote: a limit on flops, unless its unit is that of another limit ("12ms").

        Raises:
            BudgetError: When it cannot be read, with the forms that can.
        """
        if isinstance(budget, Budget):
            return budget
        units = {name: _UNITS[unit] for name, unit in (("params", "param"), ("latency", "latency"))}
        for name, unit in units.items():
            if isinstance(budget, str) and re.fullmatch(rf"{_NUMBER}\s*{unit}", budget.strip().lower()):
                return cls(**{name: budget})
        return cls(flops=budget)

    @property
    def asks_for_quality(self) -> bool:
        """Whether a quality is asked for, so that the smallest model that has it is searched for."""
        return (self.agreement, self.score, self.max_drop) != (None, None, None)

    @property
    def least_agreement(self) -> float | None:
        """The agreement that is asked for, from 0 to 1."""
        return None if self.agreement is None else _share(self.agreement)

    def without_latency(self) -> "Budget":
        """Return the same limits but for that on latency; there may be none left."""
        return self.model_copy(update={"latency": None})

    def only_costs(self, *, flops: float | None = None) -> "Budget":
        """Return the same limits without the quality that is asked for, with another one on flops if it is given."""
        changes = {"agreement": None, "score": None, "max_drop": None, "flops": self.flops if flops is None else flops}
        return self.model_copy(update=changes)

    def __str__(self) -> str:
        """Return the limits in the user's words: "flops 2.5x, params 40%"."""
        return ", ".join(f"{name} {limit}" for name, limit in self if limit is not None)

    def limits(self, dense_flops: int, dense_params: int, dense_nanoseconds: int = 0) -> "AbsoluteLimits":
        """Return the absolute limits for a dense model of these costs."""
        return AbsoluteLimits(
            flops=_absolute_limit(self.flops, "flop", dense_flops),
            params=_absolute_limit(self.params, "param", dense_params),
            nanoseconds=_absolute_limit(self.latency, "latency", dense_nanoseconds),
        )


@dataclass(frozen=True)
class AbsoluteLimits:
    """The limits of a budget for one model, as counts; None where there is no limit.

    Attributes:
        flops: Most multiply-adds of one run of the example input.
        params: Most parameters.
        nanoseconds: Longest time of one run of the example input.
    """

    flops: int | None
    params: int | None
    nanoseconds: int | None


def _absolute_limit(limit: float | str | None, unit: str, dense: int) -> int | None:
    """Return a limit as a count; a fraction of the dense count is rounded down, so that it is never exceeded."""
    if limit is None:
        return None
    keep, count = _keep_or_count(str(limit), unit)
    return count if keep is None else math.floor(keep * dense)
