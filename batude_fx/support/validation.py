"""What pydantic found wrong with a file, in one line."""

from pydantic import ValidationError


def first_problem(error: ValidationError) -> str:
    """The first problem with its place and what stands there: "ranks.layer1: Input should be ..., got '3'."."""
    first = error.errors()[0]
    place = "".join(f"{part}." for part in first["loc"]).rstrip(".")
    return f"{f'{place}: ' if place else ''}{first['msg']}, got {str(first['input'])[:80]!r}."
