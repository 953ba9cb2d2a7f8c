"""The command line: its numbers are those of the library, and JSON is all that `--json` prints."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import batude_fx
from batude_fx.training import restore
from tests.cli.commands import NAME, run, run_error, run_json
from tests.toy_networks import ConstantClassifier


def test_every_help_text_shows_an_example() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "batude_fx", "--help"], check=True, capture_output=True, text=True
    ).stdout
    for command in ("discover", "plan", "compress", "info", "evaluate"):
        assert command in text
        assert f"Example: batude-fx {command}" in " ".join(run(command, "--help").stdout.split())


def test_discover_lists_what_the_library_finds() -> None:
    sites = batude_fx.discover(timm.create_model(NAME), exclude="layer1*")
    listed = run_json("discover", NAME, "--exclude", "layer1*")
    assert listed == json.loads(json.dumps([asdict(site) for site in sites]))
    shown = run("discover", NAME, "--exclude", "layer1*").stdout
    assert all(site.name in shown for site in sites)
    assert "excluded by 'layer1*'" in shown


def test_a_network_is_found_by_the_agreement_that_is_asked_for() -> None:
    facts = run_json("plan", NAME, "--no-pretrained", "--agreement", "20%")
    assert facts["quality"]["agreement"]["images"] == 128
    assert facts["flops"] < facts["dense_flops"]


def test_plan_decides_what_the_library_decides() -> None:
    torch.manual_seed(0)
    plan = batude_fx.plan(
        timm.create_model(NAME), 0.6, calibration=None, round_to=16, layers="conv+linear",
        include=("layer*", "fc"), exclude="layer1*",
    )  # fmt: skip
    torch.manual_seed(0)  # the same weights
    facts = run_json(
        "plan", NAME, "--budget", 0.6, "--no-pretrained", "--round-to", 16, "--layers", "conv+linear",
        "--include", "layer*", "--include", "fc", "--exclude", "layer1*", "--calibration", "none",
    )  # fmt: skip
    assert facts == {
        "model": "ResNet",
        "calibration": "weights only",
        "dense_flops": plan.dense_flops,
        "flops": plan.flops,
        "dense_params": plan.dense_params,
        "params": plan.params,
        "dense_seconds": None,
        "seconds": None,
        "quality": None,
        "search": None,
        "restoration": None,
        "round_to": 16,
        "ranks": {name: {"rank_out": r.rank_out, "rank_in": r.rank_in} for name, r in plan.ranks.items()},
        "skipped": {site.name: site.skip_reason for site in plan.sites if site.skip_reason is not None},
    }
    assert facts["ranks"]
    assert not any(name.startswith(("conv1", "layer1")) for name in facts["ranks"])


@pytest.mark.filterwarnings("default:the network was compressed before")
def test_compress_writes_a_network_that_every_command_reads(folder: Path) -> None:
    facts = run_json("info", folder)
    small = batude_fx.load(folder)
    assert facts["model_args"]["base"] == NAME
    assert facts["params"] == sum(parameter.numel() for parameter in small.parameters())
    assert facts["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert facts["flops"] <= 0.5 * run_json("plan", NAME, "--budget", 0.5, "--no-pretrained")["dense_flops"]
    shown = run("info", folder).stdout
    assert all(name in shown for name in facts["model_args"]["ranks"])
    assert run_json("plan", folder, "--budget", 0.9)["dense_flops"] == facts["flops"]


@pytest.mark.parametrize("calibration", ["photos", "synthetic"])
def test_compress_calibrates_on_photos_and_on_synthetic_images(
    calibration: str, class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = timm.create_model(NAME, num_classes=10, pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: small)
    source = class_folders if calibration == "photos" else calibration
    options = ("--budget", 0.7, "--output", tmp_path / "out", "--calibration", source, "--images", 4)
    facts = run_json("compress", NAME, *options)
    assert facts["calibration"] == ("images" if calibration == "photos" else "synthetic")
    assert facts["flops"] <= 0.7 * facts["dense_flops"]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_torchvision_name_can_be_compressed(tmp_path: Path) -> None:
    options = ("--no-pretrained", "--calibration", "none", "--budget", 0.8, "--output", tmp_path / "out")
    assert run("compress", "torchvision:squeezenet1_1", *options).exit_code == 0
    assert run_json("info", tmp_path / "out")["model_args"]["library"] == "torchvision"


def test_a_budget_may_be_on_parameters_and_must_be_on_something() -> None:
    facts = run_json("plan", NAME, "--params", 0.5, "--no-pretrained", "--calibration", "none")
    assert facts["params"] <= 0.5 * facts["dense_params"]
    assert "no limit is given" in run_error("plan", NAME, "--no-pretrained")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the user asks for")
def test_a_time_is_a_budget_too() -> None:
    facts = run_json("plan", NAME, "--budget", "100s", "--no-pretrained", "--calibration", "none")
    assert facts["flops"] == facts["dense_flops"]
    assert facts["seconds"] == facts["dense_seconds"] > 0
    result = run("plan", NAME, "--latency", "12 GFLOPs", "--no-pretrained")
    assert result.exit_code == 1
    assert 'time ("12ms"; s, ms, us or ns)' in result.stderr


def test_what_torch_prints_while_it_downloads_is_not_in_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetching(*_: object, **__: object) -> nn.Module:
        sys.stdout.write("Downloading")
        return ConstantClassifier(0)

    monkeypatch.setattr(batude_fx, "create", fetching)
    assert run_json("discover", "any")


def test_report_writes_pictures(folder: Path) -> None:
    written = run("report", folder).stdout.split()
    assert written == [str(folder / name) for name in ("report.html", "flops.png", "spectra.png")]
    assert all(Path(path).exists() for path in written)
    assert "holds no report.json" in run_error("report", folder.parent)


def test_the_size_of_the_images_can_be_said(tmp_path: Path) -> None:
    small, usual = (run_json("discover", NAME, *size) for size in (["--input-size", 64], []))
    assert small[0]["positions_in"] == 64 * 64 != usual[0]["positions_in"]
    output = tmp_path / "small"
    facts = run_json(
        "compress", NAME, "--no-pretrained", "--budget", 0.6, "--calibration", "none", "--input-size", 64,
        "--output", output,
    )  # fmt: skip
    assert run_json("info", output)["flops"] == facts["flops"] <= 0.6 * facts["dense_flops"]
    assert json.loads((output / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert "is built for 224 x 224 pixels, not 64" in run_error("discover", "vit_tiny_patch16_224", "--input-size", 64)


def test_sensitivity_is_added_to_the_report_of_its_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = timm.create_model(NAME, num_classes=10, pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: small)
    out = tmp_path / "out"
    run_json("compress", NAME, "--budget", 0.7, "--output", out)
    facts = run_json("sensitivity", NAME, "--sites", 3, "--output", out)
    assert [site["measured"] is None for site in facts["sites"]][:4] == [False, False, False, True]
    report = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="sensitivity"' in report
    assert facts["sites"][0]["name"] in report
    assert (out / "sensitivity.png").is_file()
    assert "another network" in run_error("sensitivity", NAME, "--output", folder)
    assert "batude-fx compress wrote" in run_error("sensitivity", NAME, "--output", tmp_path)


def test_restore_is_an_option_of_compress(class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "_MOST", 80)
    for index in range(40):
        shutil.copy(next(class_folders.rglob("*.png")), tmp_path / f"{index}.png")
    options = ("--budget", 0.7, "--restore", "--no-pretrained")
    facts = run_json("compress", NAME, *options, "--calibration", tmp_path, "--output", tmp_path / "out")
    assert facts["restoration"]["steps"] == 5
    assert "5 steps" in " ".join(run("info", tmp_path / "out").stdout.split())
    for calibration in ("none", "synthetic"):
        given = ("--calibration", calibration, "--output", tmp_path / "other")
        assert "images of its task" in run_error("compress", NAME, *options, *given)


def test_scripts_of_timm_know_the_networks_of_this_package(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "validate.py"
    script.write_text(
        "import sys, timm, helper\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], type(timm.create_model(sys.argv[2], pretrained=True)).__name__)\n"
    )
    (tmp_path / "helper.py").write_text("")
    command = [sys.executable, "-m", "batude_fx", "timm", script, "--model", f"local-dir:{folder}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own command
    assert done.stdout.split("] ") == [f"['--model', 'local-dir:{folder}', '--help'", "ResNet\n"]
    assert "git clone" in run_error("timm", tmp_path / "missing.py")
