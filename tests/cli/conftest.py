"""A folder that `batude-fx compress` has written, and two models whose answers are known."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import batude_fx
from tests.cli.commands import NAME, run
from tests.toy_networks import ConstantClassifier


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `batude-fx compress` has written."""
    output = tmp_path_factory.mktemp("cli") / "small"
    result = run(
        "compress", NAME, "--budget", 0.5, "--output", output, "--no-pretrained", "--calibration", "none"
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "sites replaced" in result.stdout
    return output


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models whose answers are known: always class 0, always class 1."""
    models: dict[str, Callable[[], nn.Module]] = {
        "zero": lambda: ConstantClassifier(0),
        "one": lambda: ConstantClassifier(1),
    }
    monkeypatch.setattr(batude_fx, "create", lambda name, **_: models[name]())
