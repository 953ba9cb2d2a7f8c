"""Counts and shares are written in few digits."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from batude_fx.support import numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 "), (999, "999 "), (1000, "1 k"), (1234, "1.23 k"), (25557032, "25.6 M"), (4089184256, "4.09 G"),
        (3e13, "30 T"), (5.5, "5.5 "), (999_499, "999 k"), (999_999, "1 M"), (123_400_000, "123 M"),
    ],
)  # fmt: skip
def test_counts_have_three_digits_and_a_prefix(count: float, text: str) -> None:
    assert numbers.human(count) == text


@pytest.mark.parametrize(("part", "whole", "text"), [(1, 3, "33.3 %"), (1, 1, "100.0 %"), (0, 7, "0.0 %"), (1, 0, "-")])
def test_shares_are_percentages(part: float, whole: float, text: str) -> None:
    assert numbers.percent(part, whole) == text


@given(st.floats(0.01, 0.999))
def test_the_fewest_trials_show_a_share_and_one_less_does_not(share: float) -> None:
    trials = numbers.fewest_trials(share)
    assert numbers.wilson_interval(trials, trials)[0] >= share * (1 - 1e-12)
    if trials > 1:
        assert numbers.wilson_interval(trials - 1, trials - 1)[0] < share
