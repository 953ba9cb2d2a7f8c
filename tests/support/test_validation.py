"""The errors of pydantic in one line."""

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from batude_fx.support.validation import first_mistake


class Site(BaseModel):
    """Nested, so that problems have a path."""

    ranks: tuple[int, int]

    @field_validator("ranks")
    @classmethod
    def _check_order(cls, ranks: tuple[int, int]) -> tuple[int, int]:
        if ranks[0] > ranks[1]:
            raise ValueError("the second rank is smaller")
        return ranks


class Config(BaseModel):
    """A dictionary of sites."""

    sites: dict[str, Site]


def _error(text: str) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate_json(text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '{"sites": {"conv1": {"ranks": [1, "x"]}}}',
            "sites.conv1.ranks.1: Input should be a valid integer, unable to parse string as an integer, got 'x'.",
        ),
        ('{"sites": {"conv1": {"ranks": [2, 1]}}}', "sites.conv1.ranks: the second rank is smaller, got '[2, 1]'."),
        ("{}", "sites: Field required, got '{}'."),
        ('{"sites": "x\\ny"}', "sites: Input should be an object, got 'x\\ny'."),
    ],
)
def test_a_problem_is_a_line_with_place_reason_and_value(text: str, line: str) -> None:
    assert str(first_mistake(_error(text))) == line


def test_a_problem_of_the_whole_input_has_no_path() -> None:
    mistake = first_mistake(_error("[" * 500))
    assert mistake.path == ()
    assert str(mistake).startswith("Invalid JSON: ")
    assert len(str(mistake)) < 250
