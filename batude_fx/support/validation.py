"""The errors of pydantic, reduced to the first mistake, for messages of one line."""

from dataclasses import dataclass

from pydantic import ValidationError

_SHOWN = 80  # characters of a wrong value


@dataclass(frozen=True)
class Mistake:
    """A value that does not pass validation.

    Attributes:
        path: Keys and indices that lead to the value; empty where the whole input is wrong.
        reason: What was expected of the value.
        value: The value itself.
    """

    path: tuple[str, ...]
    reason: str
    value: object

    def __str__(self) -> str:
        """Return the mistake as one sentence: "ranks.layer1: Input should be a valid tuple, got '3'."."""
        place = f"{'.'.join(self.path)}: " if self.path else ""
        value = "" if isinstance(self.value, bytes) else f", got {str(self.value)[:_SHOWN]!r}"  # a whole broken file
        return f"{place}{self.reason}{value}."


def first_mistake(error: ValidationError) -> Mistake:
    """Return the first of the mistakes that pydantic reports."""
    details = error.errors(include_url=False)[0]
    return Mistake(tuple(map(str, details["loc"])), details["msg"].removeprefix("Value error, "), details["input"])
