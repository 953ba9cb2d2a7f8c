"""The command line: its numbers are the library's, its errors are one line, and JSON is all that `--json` prints."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import nn
from typer.testing import CliRunner, Result

import batude_fx
from batude_fx.evaluation import image_folder, sweep
from batude_fx_cli import app as app_module
from batude_fx_cli.app import app

NAME = "resnet10t"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _json(*arguments: object) -> Any:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images in three class folders."""
    folder = tmp_path_factory.mktemp("photos")
    values = np.random.default_rng(0)
    for label in ("ant", "bee", "cat"):
        (folder / label).mkdir()
        for index in range(2):
            Image.fromarray(values.integers(0, 255, (80, 90, 3), np.uint8)).save(folder / label / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "small"
    result = _run(
        "compress", NAME, "--budget", 0.5, "--output", output, "--no-pretrained", "--calibration", "none"
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "sites replaced" in result.stdout
    return output


def test_help_teaches() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "batude_fx", "--help"], check=True, capture_output=True, text=True
    ).stdout
    for command in ("discover", "plan", "compress", "info", "evaluate"):
        assert command in text
        assert f"Example: batude-fx {command}" in " ".join(_run(command, "--help").stdout.split())


def test_discover_lists_what_the_library_finds() -> None:
    sites = batude_fx.discover(timm.create_model(NAME), exclude="layer1*")
    listed = _json("discover", NAME, "--exclude", "layer1*")
    assert listed == json.loads(json.dumps([asdict(site) for site in sites]))
    shown = _run("discover", NAME, "--exclude", "layer1*").stdout
    assert all(site.name in shown for site in sites)
    assert "excluded by 'layer1*'" in shown


def test_plan_decides_what_the_library_decides() -> None:
    torch.manual_seed(0)
    plan = batude_fx.plan(
        timm.create_model(NAME), 0.6, calibration=None, round_to=16, layers="conv+linear",
        include=("layer*", "fc"), exclude="layer1*",
    )  # fmt: skip
    torch.manual_seed(0)  # the same weights
    facts = _json(
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
        "round_to": 16,
        "ranks": {name: {"rank_out": r.rank_out, "rank_in": r.rank_in} for name, r in plan.ranks.items()},
        "skipped": {site.name: site.skip_reason for site in plan.sites if site.skip_reason is not None},
    }
    assert facts["ranks"]
    assert not any(name.startswith(("conv1", "layer1")) for name in facts["ranks"])


def test_compress_writes_a_network_that_every_command_reads(folder: Path) -> None:
    facts = _json("info", folder)
    small = batude_fx.load(folder)
    assert facts["model_args"]["base"] == NAME
    assert facts["params"] == sum(parameter.numel() for parameter in small.parameters())
    assert facts["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert facts["flops"] <= 0.5 * _json("plan", NAME, "--budget", 0.5, "--no-pretrained")["dense_flops"]
    shown = _run("info", folder).stdout
    assert all(name in shown for name in facts["model_args"]["ranks"])
    assert _json("plan", folder, "--budget", 0.9)["dense_flops"] == facts["flops"]


@pytest.mark.parametrize("calibration", ["photos", "synthetic"])
def test_compress_calibrates(calibration: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = timm.create_model(NAME, num_classes=10, pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: small)
    source = photos if calibration == "photos" else calibration
    options = ("--budget", 0.7, "--output", tmp_path / "out", "--calibration", source, "--images", 4)
    facts = _json("compress", NAME, *options)
    assert facts["calibration"] == ("images" if calibration == "photos" else "synthetic")
    assert facts["flops"] <= 0.7 * facts["dense_flops"]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_torchvision_name_can_be_compressed(tmp_path: Path) -> None:
    options = ("--no-pretrained", "--calibration", "none", "--budget", 0.8, "--output", tmp_path / "out")
    assert _run("compress", "torchvision:squeezenet1_1", *options).exit_code == 0
    assert _json("info", tmp_path / "out")["model_args"]["library"] == "torchvision"


class Colours(nn.Module):
    """Says the same class for every image."""

    def __init__(self, favourite: int, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("answer", torch.eye(classes)[favourite])
        self.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = 0 * self.conv(x).mean((1, 2, 3))[:, None] + self.answer  # (N, classes)
        return scores


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models whose answers are known: always class 0, always class 1."""
    models: dict[str, Callable[[], nn.Module]] = {"zero": lambda: Colours(0), "one": lambda: Colours(1)}
    monkeypatch.setattr(batude_fx, "create", lambda name, **_: models[name]())


@pytest.mark.usefixtures("named")
def test_evaluate_counts_right_answers_and_agreement(photos: Path) -> None:
    assert _json("evaluate", "zero", "--data", photos) == {
        "images": 6, "top1": pytest.approx(1 / 3), "top5": 1.0
    }  # fmt: skip
    assert _json("evaluate", "zero", "--data", photos, "--against", "zero")["agreement"] == 1
    assert _json("evaluate", "zero", "--data", photos, "--against", "one")["agreement"] == 0
    assert _json("evaluate", "zero", "--data", photos / "ant", "--against", "one") == {"images": 2, "agreement": 0}
    assert "top1" in _run("evaluate", "zero", "--data", photos).stdout


@pytest.mark.usefixtures("named")
def test_models_with_other_classes_cannot_agree(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batude_fx, "create", lambda name, **_: Colours(0, classes=int(name)))
    assert "3 has 3 classes, 4 has 4" in _error("evaluate", "3", "--data", photos, "--against", "4")


def test_accuracy_is_that_of_timms_own_images(folder: Path, photos: Path) -> None:
    model = batude_fx.load(folder)
    config = resolve_data_config(model=model)  # type: ignore[no-untyped-call]
    transform = create_transform(**config, is_training=False)
    paths = sorted(photos.rglob("*.png"))
    logits = torch.cat([model(transform(Image.open(path).convert("RGB"))[None]) for path in paths])  # (6, classes)
    # Class folders get the places of what the model says, so that it is right wherever images of a folder agree.
    data = folder.parent / "data"
    answers = logits.argmax(1).tolist()
    for place in range(logits.shape[1]):
        (data / f"{place:04}").mkdir(parents=True)
    for index, (path, answer) in enumerate(zip(paths, answers, strict=True)):
        wrong = index == 0
        target = data / f"{(answer - 1 if answer else 1) if wrong else answer:04}" / f"{index}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    facts = _json("evaluate", folder, "--data", data, "--against", folder)
    assert facts["images"] == 6
    assert facts["top1"] == pytest.approx(5 / 6)
    assert facts["agreement"] == 1.0


@pytest.mark.usefixtures("named")
def test_evaluate_needs_labels_or_another_network(photos: Path, tmp_path: Path) -> None:
    assert "give --against MODEL" in _error("evaluate", "zero", "--data", photos / "ant")
    for label in "abcd":
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes((photos / "ant" / "0.png").read_bytes())
    assert "has 4 class folders, the network has 3 classes" in _error("evaluate", "zero", "--data", tmp_path)
    result = _run("evaluate", "zero", "--data", tmp_path, "--against", "zero", "--json")
    assert json.loads(result.stdout) == {"images": 4, "agreement": 1.0}
    assert "has 4 class folders" in result.stderr


def test_a_budget_may_be_on_parameters_and_must_be_on_something() -> None:
    facts = _json("plan", NAME, "--params", 0.5, "--no-pretrained", "--calibration", "none")
    assert facts["params"] <= 0.5 * facts["dense_params"]
    assert "no limit given" in _error("plan", NAME, "--no-pretrained")


def test_folders_of_other_things_are_not_written_to(photos: Path) -> None:
    assert "holds other files" in _error("compress", NAME, "--budget", 0.5, "--no-pretrained", "--output", photos)
    assert sorted(path.name for path in photos.iterdir()) == ["ant", "bee", "cat"]


# A user's mistakes


def _error(*arguments: object) -> str:
    result = _run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("budget", ["abc", "0", "1.5", "0.5x", "nan", "0.01"])
def test_a_bad_budget_ends_in_one_line_and_writes_nothing(budget: str, tmp_path: Path) -> None:
    message = _error("compress", NAME, "--budget", budget, "--output", tmp_path / "out", "--no-pretrained")
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
        (("plan", "/", "--budget", 0.5), "is no saved folder"),
    ],
)
def test_mistakes_end_in_one_line(arguments: tuple[object, ...], message: str) -> None:
    assert message in _error(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the user asks for")
def test_a_time_is_a_budget_too() -> None:
    facts = _json("plan", NAME, "--budget", "100s", "--no-pretrained", "--calibration", "none")
    assert facts["flops"] == facts["dense_flops"]
    assert facts["seconds"] == facts["dense_seconds"] > 0
    result = _run("plan", NAME, "--latency", "12 GFLOPs", "--no-pretrained")
    assert result.exit_code == 1
    assert 'time ("12ms"; s, ms, us or ns)' in result.stderr


def test_a_device_that_is_not_there_is_one_line() -> None:
    assert "Use --device cpu" in _error("plan", NAME, "--budget", 0.5, "--no-pretrained", "--device", "cuda")


def test_folders_that_hold_no_images_or_broken_ones_are_one_line(tmp_path: Path) -> None:
    plan = ("plan", NAME, "--budget", 0.7, "--no-pretrained", "--calibration", tmp_path)
    assert "holds no image" in _error(*plan)
    (tmp_path / "folder.png").mkdir()
    assert "holds no image" in _error(*plan)
    (tmp_path / "x.png").write_bytes(b"no image")
    assert "x.png cannot be read as an image" in _error(*plan)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-30],  # Pillow: OSError
        lambda whole: whole.replace(b"IDAT", b"\xd0\xb8\x0e\x10"),  # SyntaxError
        lambda whole: whole[:11] + b"\x01" + whole[12:],  # ValueError
        lambda whole: whole[:16] + b"\x7f" * 8 + whole[24:],  # DecompressionBombError
    ],
)
def test_every_kind_of_damage_to_an_image_names_the_file(
    damage: Callable[[bytes], bytes], photos: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "x.png"
    broken.write_bytes(damage((photos / "ant" / "0.png").read_bytes()))
    with pytest.raises(batude_fx.CalibrationError, match=r"x\.png cannot be read as an image"):
        next(image_folder.batches(Colours(0), [broken]))


@pytest.mark.parametrize(("count", "taken"), [(None, 6), (9, 6), (6, 6), (3, 3), (1, 1)])
def test_images_are_spread_over_the_folder(count: int | None, taken: int, photos: Path) -> None:
    paths = image_folder.image_paths(photos, count)
    assert len(set(paths)) == taken
    assert paths == sorted(paths)
    assert taken < 3 or {path.parent.name for path in paths} == {"ant", "bee", "cat"}


def test_classes_are_numbered_as_timm_numbers_them(tmp_path: Path) -> None:
    for label in ("10", "2", "b", "A", ".hidden"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / label / "0.png")
    theirs = create_dataset("", root=str(tmp_path)).reader.class_to_idx
    assert (
        image_folder.class_folders(tmp_path) == ["2", "10", "A", "b"] == [name for name in theirs if name != ".hidden"]
    )
    paths = image_folder.image_paths(tmp_path)
    assert [path.parent.name for path in paths] == ["10", "2", "A", "b"]
    assert image_folder.class_indices(paths, tmp_path) == [1, 0, 2, 3]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_broken_saved_folder_is_one_line(damage: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, broken := tmp_path / "broken")
    weights = broken / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "foreign":
        (broken / "config.json").write_text('{"architecture": "resnet50"}')
    else:
        weights.unlink()
    words = {"truncated": "is broken", "foreign": "not a config of batude_fx", "missing": "is missing"}
    assert words[damage] in _error("info", broken)


def test_models_without_colours_cannot_take_photos(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = timm.create_model(NAME, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 64, 64)})
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: grey)
    assert "does not take one colour image" in _error("plan", NAME, "--budget", 0.7, "--calibration", photos)


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
    assert "/nowhere is no folder" in _error(*arguments)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nmany lines")

    monkeypatch.setattr(batude_fx, "create", offline)
    message = _error("plan", NAME, "--budget", 0.5)
    assert "no network. All but evaluate do without its weights: --no-pretrained" in message


@pytest.mark.parametrize("config", ["{", "{}", '{"architecture": "resnet10t", "model_args": {"nonsense": 1}}', None])
def test_a_folder_that_timm_cannot_read_is_one_line(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    options = ("--budget", 0.5, "--calibration", "none", "--no-pretrained")
    assert "cannot be built" in _error("plan", f"local-dir:{tmp_path}", *options)


def test_linked_folders_are_looked_into(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "ant").symlink_to(photos / "ant")
    shutil.copytree(photos / "bee", tmp_path / "bee")
    paths = image_folder.image_paths(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"]
    assert image_folder.class_indices(paths, tmp_path) == [0, 0, 1, 1]


def test_links_that_lead_back_up_are_not_followed(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for place in (tmp_path / "photos", tmp_path / "photos" / "ant"):
        (place / "here").symlink_to(place)
        (place / "up").symlink_to(tmp_path)
    assert len(image_folder.image_paths(tmp_path)) == 6


def test_what_torch_says_while_it_fetches_is_not_in_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetching(*_: object, **__: object) -> nn.Module:
        sys.stdout.write("Downloading")
        return Colours(0)

    monkeypatch.setattr(batude_fx, "create", fetching)
    assert _json("discover", "any")


def test_evaluate_takes_classifiers_only(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Colours(0)
    monkeypatch.setattr(dense, "forward", lambda x: {"out": x})
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: dense)
    assert "Colours is no classifier" in _error("evaluate", "any", "--data", photos)


def test_an_error_of_many_lines_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise batude_fx.DiscoveryError("a :cat: [red]\n\n  b")

    monkeypatch.setattr(batude_fx, "discover", failing)
    assert _error("discover", NAME) == "error: a :cat: [red] b\n"


def test_an_output_that_is_a_file_is_one_line(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    options = ("--budget", 0.7, "--no-pretrained", "--calibration", "none", "--output", tmp_path / "out")
    assert "out is a file" in _error("compress", NAME, *options)
    assert "cannot be saved" in _error("compress", NAME, *options[:-1], tmp_path / "out" / "below")
    assert "Choose another place" in _error("sweep", NAME, "--evaluate", photos, "--output", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.filterwarnings("default")
def test_a_network_that_no_name_rebuilds_is_a_warning_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    vars(own)["pretrained_cfg"] = {"input_size": (3, 16, 16)}
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: own)
    result = _run("compress", "own", "--budget", 0.7, "--calibration", "none", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: Sequential cannot be rebuilt by name")
    assert result.stderr.count("\n") == 1
    facts = _json("info", tmp_path / "out")
    assert "flops" not in facts
    assert "foreign" in _run("info", tmp_path / "out").stdout


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
    result = _run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_errors_of_libraries_keep_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(*_: object, **__: object) -> None:
        raise OSError("image file is truncated")

    monkeypatch.setattr(batude_fx, "discover", truncated)
    result = _run("discover", NAME)
    assert "image file is truncated" in str(result.exception)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_sweep_prints_draws_and_joins_the_report(
    folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "small"
    shutil.copytree(folder, output)
    options = ("--budgets", "0.5,0.7", "--calibration", "none", "--evaluate", photos / "ant", "--no-pretrained")
    points = _json("sweep", NAME, *options, "--output", output)
    assert [point["budget"] for point in points] == [0.5, 0.7, 1.0]
    assert points[0]["flops"] <= 0.5 * points[-1]["flops"]
    assert points == json.loads((output / "sweep.json").read_text())
    assert (output / "sweep.png").exists()
    assert 'id="sweep"' in (output / "report.html").read_text()
    monkeypatch.setattr(app_module, "show", _full)
    (output / "sweep.json").unlink()
    assert "the output cannot be written or read: No space left" in _error("sweep", NAME, *options, "--output", output)
    assert points[0]["flops"] == json.loads((output / "sweep.json").read_text())[0]["flops"]
    monkeypatch.undo()
    shown = _run("sweep", NAME, *options).stdout
    assert "agreement" in shown
    assert "original" in shown


def test_a_sweep_is_not_put_into_the_report_of_another_network(folder: Path, photos: Path) -> None:
    before = (folder / "report.html").read_text()
    options = ("--budgets", "0.7", "--calibration", "none", "--evaluate", photos / "ant", "--no-pretrained")
    message = _error("sweep", "test_byobnet", *options, "--output", folder)
    assert "holds a report of another network: ResNet, whose original has" in message
    assert (folder / "report.html").read_text() == before
    assert not (folder / "sweep.json").exists()


def test_a_sweep_goes_where_a_run_has_its_network(folder: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    options = ("--budgets", "0.7", "--calibration", "none", "--evaluate", photos / "ant", "--no-pretrained")
    assert _json("sweep", NAME, *options, "--output", tmp_path)
    assert 'id="sweep"' in (tmp_path / "model" / "report.html").read_text()
    assert (tmp_path / "model" / "sweep.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    again = ("--budget", 0.6, "--calibration", "none", "--no-pretrained", "--output", tmp_path / "model")
    assert _run("compress", NAME, *again).exit_code == 0
    assert 'id="sweep"' in (tmp_path / "model" / "report.html").read_text()  # its budgets are the same network's
    torch.manual_seed(1)
    other = timm.create_model(NAME).eval()
    batude_fx.save(batude_fx.compress(other, 0.6, calibration=None), tmp_path / "model")
    assert 'id="sweep"' not in (tmp_path / "model" / "report.html").read_text()
    assert not (tmp_path / "model" / "sweep.json").exists()


def test_a_sweep_plans_for_its_tightest_budget_in_reach() -> None:
    def decide(keep: float) -> Any:
        if keep < 0.3:
            raise batude_fx.BudgetError(f"{keep} is out of reach")
        return keep

    planned: Any = sweep.plan_tightest(decide, [0.1, 0.2, 0.4, 0.5])
    assert planned == 0.4
    with pytest.raises(batude_fx.BudgetError, match=r"0\.2 is out of reach"):
        sweep.plan_tightest(decide, [0.1, 0.2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_networks_are_evaluated_in_their_own_precision(
    dtype: torch.dtype, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = timm.create_model(NAME, num_classes=3, pretrained_cfg_overlay={"input_size": (3, 64, 64)}).to(dtype)
    monkeypatch.setattr(batude_fx, "create", lambda *_, **__: network)
    assert _json("evaluate", "any", "--data", photos, "--against", "any")["agreement"] == 1


def test_report_writes_pictures(folder: Path) -> None:
    written = _run("report", folder).stdout.split()
    assert written == [str(folder / name) for name in ("report.html", "flops.png", "spectra.png")]
    assert all(Path(path).exists() for path in written)
    assert "holds no report.json" in _error("report", folder.parent)
