"""Keeps the packages off the network and their files in temporary folders; ignores these tests unless asked for."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

# Without this, a failing assert in this module does not show its values.
pytest.register_assert_rewrite("tests.others.common")

# The packages read these when they are imported, which is before any fixture runs.
os.environ.update({"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"})
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="batude-fx-ultralytics-")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Ignore these files unless the marker is the one that was asked for: elsewhere the packages are not installed."""
    return None if config.getoption("markexpr") == "others" else True


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a temporary folder, where ultralytics and Lightning leave files, and from the same seed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
