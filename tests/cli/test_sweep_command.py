"""`batude-fx sweep` prints and draws its points, and adds them to the report of the same network only."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

import batude_fx
from batude_fx_cli import app as app_module
from tests.cli.commands import NAME, run, run_error, run_json


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_sweep_prints_draws_and_joins_the_report(
    folder: Path, class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "small"
    shutil.copytree(folder, output)
    options = ("--budgets", "0.5,0.7", "--calibration", "none", "--evaluate", class_folders / "ant", "--no-pretrained")
    points = run_json("sweep", NAME, *options, "--output", output)
    assert [point["budget"] for point in points] == [0.5, 0.7, 1.0]
    assert points[0]["flops"] <= 0.5 * points[-1]["flops"]
    assert points == json.loads((output / "sweep.json").read_text())
    assert (output / "sweep.png").exists()
    assert 'id="sweep"' in (output / "report.html").read_text()
    monkeypatch.setattr(app_module, "show", _full)
    (output / "sweep.json").unlink()
    assert "the output cannot be written or read: No space left" in run_error(
        "sweep", NAME, *options, "--output", output
    )
    assert points[0]["flops"] == json.loads((output / "sweep.json").read_text())[0]["flops"]
    monkeypatch.undo()
    shown = run("sweep", NAME, *options).stdout
    assert "agreement" in shown
    assert "original" in shown


def test_a_sweep_is_not_put_into_the_report_of_another_network(folder: Path, class_folders: Path) -> None:
    before = (folder / "report.html").read_text()
    options = ("--budgets", "0.7", "--calibration", "none", "--evaluate", class_folders / "ant", "--no-pretrained")
    message = run_error("sweep", "test_byobnet", *options, "--output", folder)
    assert "holds a report of another network: ResNet, whose original has" in message
    assert (folder / "report.html").read_text() == before
    assert not (folder / "sweep.json").exists()


def test_a_sweep_goes_where_a_run_has_its_network(folder: Path, class_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    options = ("--budgets", "0.7", "--calibration", "none", "--evaluate", class_folders / "ant", "--no-pretrained")
    assert run_json("sweep", NAME, *options, "--output", tmp_path)
    assert 'id="sweep"' in (tmp_path / "model" / "report.html").read_text()
    assert (tmp_path / "model" / "sweep.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    again = ("--budget", 0.6, "--calibration", "none", "--no-pretrained", "--output", tmp_path / "model")
    assert run("compress", NAME, *again).exit_code == 0
    assert 'id="sweep"' in (tmp_path / "model" / "report.html").read_text()  # its budgets are the same network's
    torch.manual_seed(1)
    other = timm.create_model(NAME).eval()
    batude_fx.save(batude_fx.compress(other, 0.6, calibration=None), tmp_path / "model")
    assert 'id="sweep"' not in (tmp_path / "model" / "report.html").read_text()
    assert not (tmp_path / "model" / "sweep.json").exists()
