"""Mistakes of the user end in one line of error, or of warning, and nothing is written."""

import shutil
from pathlib import Path

import pytest
import timm
from torch import nn

import batude_fx
from tests.cli.commands import NAME, run, run_error, run_json


def test_folders_of_other_things_are_not_written_to(class_folders: Path) -> None:
    assert "holds other files" in run_error(
        "compress", NAME, "--budget", 0.5, "--no-pretrained", "--output", class_folders
    )
    assert sorted(path.name for path in class_folders.iterdir()) == ["ant", "bee", "cat"]


@pytest.mark.parametrize("budget", ["abc", "0", "1.5", "0.5x", "nan", "0.01"])
def test_a_bad_budget_ends_in_one_line_and_writes_nothing(budget: str, tmp_path: Path) -> None:
    message = run_error("compress", NAME, "--budget", budget, "--output", tmp_path / "out", "--no-pretrained")
    assert "at least" in message if budget == "0.01" else "fraction that remains" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("discover", "resnet51"), "Close names"),
        (("discover", f"{NAME}.nonsense"), "Invalid pretrained tag"),
        (("discover", "torchvision:raft_small", "--exclude", "nothing*"), "nothing*"),
        (("discover", NAME, "--include", "nothing*"), "nothing*"),
        (("plan", NAME, "--budget", 0.5, "--no-pretrained", "--device", "nonsense"), "Use --device cpu"),
        (("plan", NAME, "--budget", 0.5, "--no-pretrained", "--device", "meta"), "Use --device cpu"),
        (("info", "/nowhere"), "has no config.json"),
        (("compress", NAME, "--output", "/nowhere"), "use --budget, --params, --latency or --agreement"),
        (("plan", "/", "--budget", 0.5), "is no saved folder"),
    ],
)
def test_mistakes_end_in_one_line(arguments: tuple[object, ...], message: str) -> None:
    assert message in run_error(*arguments)


def test_a_device_that_is_not_there_is_refused_in_one_line() -> None:
    assert "Use --device cpu" in run_error("plan", NAME, "--budget", 0.5, "--no-pretrained", "--device", "cuda")


def test_folders_that_hold_no_images_or_broken_ones_are_refused_in_one_line(tmp_path: Path) -> None:
    plan = ("plan", NAME, "--budget", 0.7, "--no-pretrained", "--calibration", tmp_path)
    assert "holds no image" in run_error(*plan)
    (tmp_path / "folder.png").mkdir()
    assert "holds no image" in run_error(*plan)
    (tmp_path / "x.png").write_bytes(b"no image")
    assert "x.png cannot be read as an image" in run_error(*plan)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_broken_saved_folder_is_refused_in_one_line(damage: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, broken := tmp_path / "broken")
    weights = broken / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "foreign":
        (broken / "config.json").write_text('{"architecture": "resnet50"}')
    else:
        weights.unlink()
    words = {"truncated": "is broken", "foreign": "not a config of batude_fx", "missing": "is missing"}
    assert words[damage] in run_error("info", broken)


def test_models_of_grey_images_refuse_photos(class_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = timm.create_model(NAME, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 64, 64)})
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: grey)
    assert "does not take one colour image" in run_error("plan", NAME, "--budget", 0.7, "--calibration", class_folders)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", NAME, "--budget", 0.5, "--calibration", "/nowhere"),
        ("compress", NAME, "--budget", 0.5, "--calibration", "/nowhere", "--output", "/nowhere/else"),
        ("sweep", NAME, "--evaluate", "/nowhere"),
        ("evaluate", NAME, "--data", "/nowhere"),
        ("export", NAME, "a.onnx", "--int8", "/nowhere"),
    ],
)
def test_folders_are_looked_for_before_weights_are_fetched(
    arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: pytest.fail("weights were fetched"))
    assert "/nowhere is no folder" in run_error(*arguments)


def test_weights_that_cannot_be_fetched_are_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nmany lines")

    monkeypatch.setattr(batude_fx, "create", offline)
    message = run_error("plan", NAME, "--budget", 0.5)
    assert "no network. All commands but evaluate can do without trained weights: --no-pretrained" in message


@pytest.mark.parametrize("config", ["{", "{}", '{"architecture": "resnet10t", "model_args": {"nonsense": 1}}', None])
def test_a_folder_that_timm_cannot_read_is_refused_in_one_line(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    options = ("--budget", 0.5, "--calibration", "none", "--no-pretrained")
    assert "cannot be built" in run_error("plan", f"local-dir:{tmp_path}", *options)


def test_an_error_of_many_lines_is_printed_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise batude_fx.DiscoveryError("a :cat: [red]\n\n  b")

    monkeypatch.setattr(batude_fx, "discover", failing)
    assert run_error("discover", NAME) == "error: a :cat: [red] b\n"


def test_an_output_that_is_a_file_is_refused_in_one_line(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    options = ("--budget", 0.7, "--no-pretrained", "--calibration", "none", "--output", tmp_path / "out")
    assert "out is a file" in run_error("compress", NAME, *options)
    below = tmp_path / "out" / "below"
    assert "cannot be written: Not a directory" in run_error("compress", NAME, *options[:-1], below)
    assert "Choose another place" in run_error("sweep", NAME, "--evaluate", class_folders, "--output", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.filterwarnings("default")
def test_a_network_that_no_name_rebuilds_gives_a_warning_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    vars(own)["pretrained_cfg"] = {"input_size": (3, 16, 16)}
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: own)
    result = run("compress", "own", "--budget", 0.7, "--calibration", "none", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: Sequential cannot be rebuilt by name")
    assert result.stderr.count("\n") == 1
    facts = run_json("info", tmp_path / "out")
    assert "flops" not in facts
    assert "foreign" in run("info", tmp_path / "out").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", NAME),
        ("evaluate", NAME),
        ("discover",),
        ("discover", NAME, "--layers", "all"),
        ("plan", NAME, "--budget", "0.5", "--round-to", "0"),
        ("plan", NAME, "--budget", "0.5", "--round-to", "often"),
        ("plan", NAME, "--budget", "0.5", "--images", "0"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_errors_of_libraries_keep_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(*_: object, **__: object) -> None:
        raise OSError("image file is truncated")

    monkeypatch.setattr(batude_fx, "discover", truncated)
    result = run("discover", NAME)
    assert "image file is truncated" in str(result.exception)


@pytest.mark.filterwarnings("default")
def test_a_broken_report_is_a_warning_and_the_network_is_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, broken := tmp_path / "broken")
    (broken / "report.json").write_text("{")
    for arguments in (("info", broken), ("discover", broken), ("export", broken, tmp_path / "small.pt2")):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "report.json is broken" in result.stderr
        assert result.stderr.count("\n") == 1


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def stopped(*_: object, **__: object) -> None:
        raise batude_fx.TrainingError("interrupted after step 3") from KeyboardInterrupt()

    for stop, words in ((interrupted, "error: interrupted.\n"), (stopped, "error: interrupted after step 3\n")):
        monkeypatch.setattr(batude_fx, "discover", stop)
        result = run("discover", NAME)
        assert (result.exit_code, result.stderr) == (130, words)
