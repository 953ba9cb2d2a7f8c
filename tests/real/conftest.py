"""Turns a registry that cannot be reached into a skip with its reason, in a test's body and in its fixtures."""

from collections.abc import Generator

import pytest

from tests.real.registry import InputsUnavailable


def _skip_without_inputs() -> Generator[None, object, object]:
    try:
        return (yield)
    except InputsUnavailable as reason:
        pytest.skip(str(reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _skip_without_inputs())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _skip_without_inputs())
