"""Budgets: every form a user may write, and a clear refusal of every other."""

import pytest

from batude_fx import Budget, BudgetError


@pytest.mark.parametrize(
    ("written", "flops"),
    [
        (0.5, 500_000_000),
        ("0.5", 500_000_000),
        ("2.5x", 400_000_000),
        (" 40 % ", 400_000_000),
        ("0.9GFLOPs", 900_000_000),
        ("900 mflops", 900_000_000),
        ("1e6flops", 1_000_000),
    ],
)
def test_a_budget_in_any_form_is_a_limit_on_flops(written: float | str, flops: int) -> None:
    limits = Budget.parse(written).limits(dense_flops=10**9, dense_params=10**7)
    assert limits.flops == flops
    assert limits.params is None


def test_several_limits_hold_at_once() -> None:
    limits = Budget(flops=0.5, params="2MParams").limits(dense_flops=1001, dense_params=10**7)
    assert (limits.flops, limits.params) == (500, 2_000_000)


@pytest.mark.parametrize(
    ("written", "nanoseconds"),
    [("1.8x", 50_000_000), (0.5, 45_000_000), ("12ms", 12_000_000), ("0.5 s", 500_000_000), ("800us", 800_000)],
)
def test_a_latency_is_a_share_or_a_time(written: float | str, nanoseconds: int) -> None:
    limits = Budget(latency=written).limits(10**9, 10**7, 90_000_000)
    assert (limits.flops, limits.params, limits.nanoseconds) == (None, None, nanoseconds)


def test_a_unit_says_what_is_limited() -> None:
    assert Budget.parse("12ms") == Budget(latency="12ms")
    assert Budget.parse("2MParams") == Budget(params="2MParams")


@pytest.mark.parametrize("written", ["12", "12GFLOPs", "-3ms", "0ms", "1.0x", "fast"])
def test_other_forms_of_a_latency_are_refused(written: str) -> None:
    with pytest.raises(BudgetError, match="12ms"):
        Budget(latency=written)


@pytest.mark.parametrize(
    "written", ["abc", 0, 1, 1.5, -0.5, "0.5x", "1x", "0x", "120%", float("nan"), float("inf"), "", "0flops"]
)
def test_anything_else_is_refused_in_one_line_with_the_way_out(written: float | str) -> None:
    with pytest.raises(BudgetError) as error:
        Budget.parse(written)
    assert "\n" not in str(error.value)
    assert repr(written) in str(error.value)
    assert "2.5x" in str(error.value)


@pytest.mark.parametrize(("written", "words"), [
    ("50", 'must be inside \\(0, 1\\); "50%" keeps 50 percent, and "50x" is a factor'),
    (2.5, '"2.5%" keeps 2.5 percent, and "2.5x" is a factor'),
    (-1, "-1 of the flops; the fraction that remains must be inside"),
])  # fmt: skip
def test_a_number_outside_its_range_is_told_what_it_may_mean(written: float | str, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Budget.parse(written)


def test_a_budget_needs_a_limit_and_knows_its_fields() -> None:
    with pytest.raises(BudgetError, match="no limit given"):
        Budget()
    with pytest.raises(BudgetError, match=r"flop=0\.5: Extra inputs"):
        Budget(flop=0.5)
    with pytest.raises(BudgetError, match=r"params='100k': cannot read"):
        Budget(params="100k")


def test_counts_beyond_any_network_are_no_limit() -> None:
    assert (Budget.parse("1e999GFLOPs").limits(10**9, 10**7).flops or 0) >= 2**62
