"""The errors of pydantic, reduced to the first problem, for messages of one line."""

from dataclasses import dataclass

from pydantic import ValidationError

_SHOWN = 80  # characters of a wrong value


@dataclass(frozen=True)
class Problem:
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
        """Return the problem as one sentence: "ranks.layer1: Input should be a valid tuple, got '3'."."""
        place = f"{'.'.join(self.path)}: " if self.path else ""
        return f"{place}{self.reason}, got {str(self.value)[:_SHOWN]!r}."


def first_problem(error: ValidationError) -> Problem:
    """Return the first of the problems that pydantic reports."""
    details = error.errors(include_url=False)[0]
    return Problem(tuple(map(str, details["loc"])), details["msg"].removeprefix("Value error, "), details["input"])
