"""Files from unknown sources: read up to a size, and pydantic's errors reduced to the first mistake of one line."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

MOST_BYTES = 2**24
_SHOWN = 80  # characters of a wrong value, or of a key


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
        place = f"{'.'.join(key[:_SHOWN] for key in self.path)}: " if self.path else ""
        value = "" if isinstance(self.value, bytes) else f", got {str(self.value)[:_SHOWN]!r}"  # a whole broken file
        return f"{place}{self.reason}{value}."


def read_limited(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        ValueError: When it is larger than any that batude_fx writes.
        OSError: When it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return content


def first_mistake(error: ValidationError) -> Mistake:
    """Return the first of the mistakes that pydantic reports."""
    details = error.errors(include_url=False)[0]
    return Mistake(tuple(map(str, details["loc"])), details["msg"].removeprefix("Value error, "), details["input"])
