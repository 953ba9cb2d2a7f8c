"""Durations are written in full, and are shares of an epoch or of a phase."""

import yaml
from hypothesis import given
from hypothesis import strategies as st

from batude_fx import Recipe
from batude_fx.training.duration import Duration
from tests.training.recipe_text import GOOD


@given(st.integers(0, 10**9))
def test_durations_are_written_in_full(amount: int) -> None:
    recipe = Recipe.model_validate(yaml.safe_load(GOOD))
    phase = recipe.finalize.model_copy(update={"epochs": Duration(amount, "steps")})
    long = recipe.model_copy(update={"finalize": phase})
    assert Recipe.model_validate(yaml.safe_load(long.to_yaml())) == long


@given(st.floats(0, 1000), st.integers(1, 500), st.integers(0, 10**5))
def test_durations_are_shares_of_something(amount: float, per_epoch: int, phase: int) -> None:
    assert Duration(amount, "epochs").steps(per_epoch) == round(amount * per_epoch)
    assert Duration(amount, "steps").steps(per_epoch, phase) == round(amount)
    assert Duration(amount, "%").steps(per_epoch, phase) == round(amount * phase / 100)
