"""Exported files run by their own runtimes, and held against the network that they came from."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import openvino
import pytest
import timm
import torch
import torchvision
from torch import nn
from typer.testing import CliRunner

import batude_fx
from batude_fx import CalibrationError, ExportError
from batude_fx.deploy import export
from batude_fx.deploy.comparison import Runner
from batude_fx_cli.app import app

Run = Callable[[Path, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
    return batude_fx.compress(model.train(), 0.6, calibration=None)


def _onnx(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, {"input": images})
    return outputs[0]


def _openvino(path: Path, images: np.ndarray) -> np.ndarray:
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled([images])[0])


def _pt2(path: Path, images: np.ndarray) -> np.ndarray:
    return np.asarray(torch.export.load(path).module()(torch.from_numpy(images)))


@pytest.mark.parametrize(("name", "run"), [("a.onnx", _onnx), ("a.xml", _openvino), ("a.pt2", _pt2)])
def test_every_batch_size_gives_the_networks_outputs(small: nn.Module, tmp_path: Path, name: str, run: Run) -> None:
    path = tmp_path / "new" / name
    assert batude_fx.export(small, path).difference <= 1e-4
    for size in (1, 5):
        images = torch.randn(size, 3, 160, 160)
        with torch.no_grad():
            expected = small.eval()(images).numpy()
        np.testing.assert_allclose(run(path, images.numpy()), expected, rtol=1e-4, atol=1e-5)
    assert {file.suffix for file in path.parent.iterdir()} <= {path.suffix, ".bin"}
    assert small.train().training


def test_the_batch_axis_has_a_name(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 4, 3)
    batude_fx.export(network, tmp_path / "a.onnx", example_inputs=torch.zeros(1, 3, 8, 8))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert [value.shape for value in session.get_inputs()] == [["batch", 3, 8, 8]]
    assert [value.shape for value in session.get_outputs()] == [["batch", 4, 6, 6]]


def test_no_batch_norm_is_left(small: nn.Module, tmp_path: Path) -> None:
    batude_fx.export(small, tmp_path / "a.onnx")
    graph = onnx.load(tmp_path / "a.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds


def test_the_memory_format_leaves_no_trace_in_the_file(small: nn.Module, tmp_path: Path) -> None:
    last, image = copy.deepcopy(small).to(memory_format=torch.channels_last), torch.zeros(2, 3, 160, 160)
    kinds = []
    for index, (network, x) in enumerate([(small, image), (last, image.to(memory_format=torch.channels_last))]):
        batude_fx.export(network, path := tmp_path / f"{index}.onnx", example_inputs=x)
        kinds.append([node.op_type for node in onnx.load(path).graph.node])
    assert kinds[0] == kinds[1]


@pytest.mark.filterwarnings("ignore:int8 images look as if")  # their colours are further apart than any
def test_int8_is_small_and_close(small: nn.Module, tmp_path: Path) -> None:
    images = 3 * torch.randn(16, 3, 1, 1) + torch.randn(16, 3, 160, 160)  # colours that the network can tell
    batude_fx.export(small, tmp_path / "full.onnx")
    comparison = batude_fx.export(small, tmp_path / "int8.onnx", int8=images)
    full, int8 = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("full", "int8"))
    assert int8 < 0.6 * full  # weights are a quarter; this network has few
    ours, theirs = (_onnx(tmp_path / f"{name}.onnx", images.numpy()) for name in ("full", "int8"))
    gap, spread = theirs - ours, ours - ours.mean(0)
    assert (gap**2).mean() < 0.05 * (spread**2).mean()
    assert comparison.images == 16
    assert comparison.relative_error == pytest.approx((gap**2).sum() / (ours**2).sum(), rel=1e-3)
    assert comparison.agreement == (ours.argmax(1) == theirs.argmax(1)).mean()


def _quantized_weights(path: Path) -> list[np.ndarray]:
    """Return the integers of all weights in a file: inputs of DequantizeLinear with several dimensions."""
    graph = onnx.load(path).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    names = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    return [
        stored[name] for name in names if name in stored and stored[name].dtype == np.int8 and stored[name].ndim > 1
    ]


def _sums_of_pairs_fit_sixteen_bits(weights: np.ndarray) -> bool:
    """Return whether `vpmaddubsw` can add the products of any two weights and activations of 8 bits, cutting nothing.

    On processors without VNNI, onnxruntime multiplies pairs of weights of one output, in an order of its own.
    """
    rows = weights.reshape(len(weights), -1).astype(np.int64)
    largest = np.sort(np.abs(rows), axis=1)[:, -2:].sum(1)
    return bool((255 * largest <= 2**15 - 1).all())


@pytest.mark.parametrize(("images", "words"), [
    (torch.rand(16, 3, 160, 160), "int8 images look as if they were not normalized"),
    (torch.randn(1, 3, 160, 160), "int8 has only 1 image; ranges measured on so few are uncertain"),
])  # fmt: skip
def test_images_that_ranges_should_not_be_measured_on_are_noticed(
    images: torch.Tensor, words: str, small: nn.Module, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=words) as caught:
        batude_fx.export(small, tmp_path / "int8.onnx", int8=images)
    assert caught[0].filename == __file__


def test_int8_weights_are_small_enough_for_every_processor(small: nn.Module, tmp_path: Path) -> None:
    batude_fx.export(small, tmp_path / "int8.onnx", int8=torch.randn(8, 3, 160, 160))
    weights = _quantized_weights(tmp_path / "int8.onnx")
    assert len(weights) > 10
    assert all(map(_sums_of_pairs_fit_sixteen_bits, weights))
    assert max(np.abs(array).max() for array in weights) == 64
    assert not _sums_of_pairs_fit_sixteen_bits(np.full((1, 2), 127, np.int8))  # eight bits would not be


def test_the_size_of_images_may_be_free(tmp_path: Path) -> None:
    network = batude_fx.compress(timm.create_model("resnet18", num_classes=5).eval(), 0.6, calibration=None)
    batude_fx.export(network, tmp_path / "any.onnx", dynamic_size=True)
    session = onnxruntime.InferenceSession(tmp_path / "any.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for height, width in ((64, 64), (97, 131)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = network(images).numpy()
        np.testing.assert_allclose(_onnx(tmp_path / "any.onnx", images.numpy()), expected, rtol=1e-4, atol=1e-4)


class _Halves(nn.Module):
    """Adds a map to its half, doubled again: sides must be even."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        half = nn.functional.max_pool2d(y, 2)
        return y + nn.functional.interpolate(half, scale_factor=2)


def test_sizes_may_have_to_be_multiples(tmp_path: Path) -> None:
    network = _Halves().eval()
    batude_fx.export(network, tmp_path / "a.onnx", example_inputs=torch.zeros(1, 3, 64, 64), dynamic_size=True)
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        expected = network(images).numpy()
    np.testing.assert_allclose(_onnx(tmp_path / "a.onnx", images.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_a_network_of_one_size_is_refused_with_its_size(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    with pytest.raises(
        ExportError, match=r"for images of any size: .*Leave out dynamic_size; .* images of 8 x 8 pixels"
    ):
        batude_fx.export(network, tmp_path / "a.onnx", example_inputs=torch.zeros(1, 3, 8, 8), dynamic_size=True)


class _ByName(nn.Module):
    """Takes its image by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.last = nn.Conv2d(16, 16, 3)

    def forward(self, *, image: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.conv(image).relu()).mean((2, 3))
        return y


@pytest.mark.parametrize("name", ["a.onnx", "a.xml", "a.pt2", "int8.onnx"])
def test_an_image_may_be_given_by_name(name: str, tmp_path: Path) -> None:
    example, images = {"image": torch.zeros(1, 3, 16, 16)}, torch.randn(16, 3, 16, 16)
    small = batude_fx.compress(_ByName(), 0.7, example_inputs=example, calibration=images)
    comparison = batude_fx.export(
        small, tmp_path / name, example_inputs=example, int8=images if name == "int8.onnx" else None
    )
    assert comparison.relative_error < (0.05 if name == "int8.onnx" else 1e-8)


class _Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.conv(x) + y, "y": 2 * y}


def test_several_arguments_and_outputs_are_exported(tmp_path: Path) -> None:
    inputs = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 6)
    for name in ("a.onnx", "a.xml", "a.pt2"):
        assert batude_fx.export(_Several(), tmp_path / name, example_inputs=inputs).difference <= 1e-4


class _Unusual(nn.Module):
    """Outputs that are no floats, not finite or no tensors, and an input that is worked on in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y = self.conv(x.mul_(2))
        return y, y > 0, torch.where(y > 0, y, -torch.inf), None


@pytest.mark.parametrize("name", ["a.onnx", "a.pt2"])
def test_unusual_outputs_are_compared_as_what_they_are(tmp_path: Path, name: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    before = x.clone()
    assert batude_fx.export(_Unusual(), tmp_path / name, example_inputs=x).difference <= 1e-4
    assert torch.equal(x, before)


def test_outputs_of_nan_are_refused(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nan(network: nn.Module, _request: object, path: Path, _images: object) -> Runner:
        path.write_bytes(b"wrong")
        good = network(torch.zeros(1, 3, 160, 160)).shape[1]
        return lambda inputs: [torch.full((len(inputs.image), good), torch.nan)]

    monkeypatch.setattr(export, "_WRITERS", {".pt2": write_nan})
    with pytest.raises(ExportError, match="by nan"):
        batude_fx.export(small, tmp_path / "a.pt2")


def test_impossible_exports_are_refused_with_the_reason(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=r"ending '\.tflite'; use \.onnx, \.xml, \.pt2"):
        batude_fx.export(small, tmp_path / "a.tflite")
    with pytest.raises(ExportError, match="int8 is written as ONNX only"):
        batude_fx.export(small, tmp_path / "a.xml", int8=torch.randn(1, 3, 160, 160))
    with pytest.raises(CalibrationError, match="the file takes"):
        batude_fx.export(small, tmp_path / "a.onnx", int8=torch.randn(1, 3, 16, 16))
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        batude_fx.export(small, tmp_path / "folder.onnx")
    with pytest.raises(CalibrationError, match="int8 got no images"):
        batude_fx.export(small, tmp_path / "a.onnx", int8=[])
    with pytest.raises(ExportError, match="cannot be written"):
        batude_fx.export(small, "/proc/nothing/a.onnx")
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(ExportError, match="other arguments than tensors"):
        batude_fx.export(detector, tmp_path / "a.onnx")
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime, openvino: pip install"):
        batude_fx.export(small, tmp_path / "a.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


class _Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return y if x.sum() > 0 else -y


@pytest.mark.parametrize(("ending", "dtype"), [
    (".onnx", torch.float16), (".xml", torch.float64), (".pt2", torch.bfloat16), (".pt2", torch.float16),
])  # fmt: skip
def test_a_precision_that_cannot_be_written_is_refused(
    ending: str, dtype: torch.dtype, small: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"holds {dtype}, which cannot be written; use model\.float\(\)"):
        batude_fx.export(copy.deepcopy(small).to(dtype), tmp_path / f"small{ending}")


def test_a_network_that_decides_by_values_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="_Decides cannot be written"):
        batude_fx.export(_Decides(), tmp_path / "a.onnx", example_inputs=torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_file_whose_outputs_differ_is_not_kept(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pt2").write_text("the one before", encoding="utf-8")

    def write_wrong(_network: nn.Module, _request: object, path: Path, _images: object) -> Runner:
        path.write_bytes(b"wrong")
        return lambda inputs: [torch.zeros(len(inputs.image), 7)]

    monkeypatch.setattr(export, "_WRITERS", {".pt2": write_wrong})
    with pytest.raises(ExportError, match="differ from those"):
        batude_fx.export(small, tmp_path / "a.pt2")
    assert (tmp_path / "a.pt2").read_text(encoding="utf-8") == "the one before"
    assert len(list(tmp_path.iterdir())) == 1


def test_export_works_on_the_command_line(small: nn.Module, tmp_path: Path) -> None:
    batude_fx.save(small, tmp_path / "saved")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "saved"), str(tmp_path / "a.onnx")])
    assert result.exit_code == 0
    assert "largest difference" in result.stdout
    unknown = CliRunner().invoke(app, ["export", "no such model", str(tmp_path / "a.tflite")])
    assert unknown.exit_code == 1
    assert "use .onnx, .xml, .pt2" in unknown.stderr  # said before the model is looked for
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = batude_fx.load(tmp_path / "saved")(images).numpy()
    np.testing.assert_allclose(_onnx(tmp_path / "a.onnx", images.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_files_say_how_images_are_prepared(small: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(8, 3, 160, 160)
    written = {
        "float.onnx": batude_fx.export(small, tmp_path / "float.onnx"),
        "int8.onnx": batude_fx.export(small, tmp_path / "int8.onnx", int8=images),
    }
    batude_fx.export(small, tmp_path / "small.xml")
    config = small.pretrained_cfg
    expected = {"mean": list(config["mean"]), "std": list(config["std"]), "input_size": [3, 160, 160]}
    for name, comparison in written.items():
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        metadata = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
        assert metadata.items() >= {**expected, "interpolation": config["interpolation"]}.items()
        (graph_input,) = session.get_inputs()
        assert comparison.inputs == {graph_input.name: tuple(map(str, graph_input.shape))}
    read = openvino.Core().read_model(tmp_path / "small.xml")
    assert {key: json.loads(read.get_rt_info(["model_info", key]).astype(str)) for key in expected} == expected
