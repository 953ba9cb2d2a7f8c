"""Lengths of training as recipes write them: 3, "3 epochs", "500 steps" or "40%" of a phase."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

Unit = Literal["epochs", "steps", "%"]
_FORM = re.compile(r"([0-9]{0,9}\.?[0-9]{1,15})\s*(epochs?|steps?|%)?")
_MOST: dict[Unit, float] = {"epochs": 1e5, "steps": 1e9, "%": 1e4}
_UNITS: dict[str | None, Unit] = {
    None: "epochs", "epoch": "epochs", "epochs": "epochs", "step": "steps", "steps": "steps", "%": "%",
}  # fmt: skip


@dataclass(frozen=True)
class Duration:
    """A length of training.

    Attributes:
        amount: The number of units.
        unit: What is counted; "%" is a share of the phase.
    """

    amount: float
    unit: Unit

    def steps(self, steps_per_epoch: int, phase_steps: int = 0) -> int:
        """Return the length in optimizer steps, rounded.

        Args:
            steps_per_epoch: Optimizer steps of an epoch.
            phase_steps: Optimizer steps of the phase, of which "%" is a share.
        """
        scale = {"epochs": steps_per_epoch, "steps": 1, "%": phase_steps / 100}[self.unit]
        return round(self.amount * scale)

    def __str__(self) -> str:
        """Return the length as a recipe writes it."""
        return f"{self.amount:.15g}%" if self.unit == "%" else f"{self.amount:.15g} {self.unit}"


def _parse(value: object, *, allow_share: bool) -> Duration:
    """Read a length from a number of epochs or from text.

    Raises:
        ValueError: When it has none of the forms, or is a share where `allow_share` is False.
    """
    if isinstance(value, Duration):
        return value
    match = None if isinstance(value, bool) else _FORM.fullmatch(str(value).strip())
    if match and (allow_share or match[2] != "%"):
        amount, unit = float(match[1]), _UNITS[match[2]]
        if amount > _MOST[unit]:
            raise ValueError(f"{amount:g} is too long; write at most {_MOST[unit]:g} {unit}")
        return Duration(amount, unit)
    forms = '3, "3 epochs" or "500 steps"' + (', or "40%" of the phase' if allow_share else "")
    raise ValueError(f"{str(value)[:80]!r} is not a length of training; write {forms}")


def _check_above_zero(interval: Duration) -> Duration:
    """Refuse an interval of no length.

    Raises:
        ValueError: When it is zero.
    """
    if not interval.amount:
        raise ValueError(f"{interval} is not an interval; write more than 0")
    return interval


_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": _FORM.pattern}]}
# The types of fields in recipes. `Any`, as the schema describes what is written in YAML, and not `Duration`.
Length = Annotated[Any, BeforeValidator(partial(_parse, allow_share=False)), Field(json_schema_extra=_SCHEMA)]
LengthOrShare = Annotated[Any, BeforeValidator(partial(_parse, allow_share=True)), Field(json_schema_extra=_SCHEMA)]
Interval = Annotated[Length, AfterValidator(_check_above_zero)]
IntervalOrShare = Annotated[LengthOrShare, AfterValidator(_check_above_zero)]
