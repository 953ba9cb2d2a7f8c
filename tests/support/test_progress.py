"""Progress is shown on the error stream of a terminal, and nowhere else."""

from io import StringIO
from types import SimpleNamespace

import pytest

from batude_fx.support import progress


def test_progress_is_silent_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_on_its_error_stream(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = StringIO()
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True, write=terminal.write, flush=lambda: None))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress.track(iter(range(3)), "counting", 3)) == [0, 1, 2]
    assert "counting" in terminal.getvalue()
    assert capsys.readouterr().out == ""
