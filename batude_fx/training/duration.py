"""Recipes: what to train, on what, under which budget and for how long, as YAML checked by frozen pydantic models.

A recipe holds names and numbers only: models, datasets, optimizers and schedules are looked up in the registries of
timm and torchvision; YAML tags and aliases are refused, so that reading one executes nothing. Everything that is wrong
with a recipe is said in one line with file, line and key, before anything is trained.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

_DURATION = re.compile(r"([0-9]*\.?[0-9]+)\s*(epochs?|steps?|%)?")


@dataclass(frozen=True)
class Duration:
    """A length of training.

    Attributes:
        amount: How many.
        unit: Of what; "%" is a share of the phase.
    """

    amount: float
    unit: Literal["epochs", "steps", "%"]

    def steps(self, per_epoch: int, phase: int = 0) -> int:
        """In optimizer steps, rounded, of which an epoch has `per_epoch` and the whole phase `phase`."""
        scale = {"epochs": per_epoch, "steps": 1, "%": phase / 100}[self.unit]
        return round(self.amount * scale)

    def __str__(self) -> str:
        """As it is written in a recipe."""
        return f"{self.amount:.15g}%" if self.unit == "%" else f"{self.amount:.15g} {self.unit}"


def _duration(value: object, *, shares: bool) -> Duration:
    if isinstance(value, Duration):
        return value
    match = None if isinstance(value, bool) else _DURATION.fullmatch(str(value).strip())
    unit = {"e": "epochs", "s": "steps", "%": "%"}[(match[2] or "epochs")[0]] if match else ""
    if not match or (unit == "%" and not shares):
        forms = '3, "3 epochs" or "500 steps"' + (', or "40%" of the phase' if shares else "")
        raise ValueError(f"{value!r} is no length of training; write {forms}")
    return Duration(float(match[1]), unit)  # type: ignore[arg-type]


def _above_zero(interval: Duration) -> Duration:
    if not interval.amount:
        raise ValueError(f"{interval} is no interval; write more than 0")
    return interval


_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": _DURATION.pattern}]
}
Length = Annotated[Any, BeforeValidator(partial(_duration, shares=False)), Field(json_schema_extra=_SCHEMA)]
LengthOrShare = Annotated[Any, BeforeValidator(partial(_duration, shares=True)), Field(json_schema_extra=_SCHEMA)]
Interval = Annotated[Length, AfterValidator(_above_zero)]
IntervalOrShare = Annotated[LengthOrShare, AfterValidator(_above_zero)]
