"""A network as a file that runs without batude_fx: ONNX, OpenVINO or torch.export, checked against the network itself.

Batch-norms are folded first. What is written is run on the example input, one image and three, and held against the
network before it takes its place: a file that computes something else is never left behind.

Source: torch.onnx (the exporter on torch.export); OpenVINO's `convert_model`; for int8, see `quantizing`.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.calibration.images import Images, image_batches
from batude_fx.deploy.fold import fold
from batude_fx.deploy.int8 import equalize_, quantize
from batude_fx.errors import CalibrationError, ExportError, first_line
from batude_fx.graph.example_inputs import resolve_inputs
from batude_fx.graph.surgery import copy_model
from batude_fx.support.progress import track

TOLERANCE = 1e-4  # of float outputs, relative to the largest of them
_BATCHES = (1, 3)
_NEEDS = {
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".xml": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    ".pt2": (),
}
_DTYPES = {
    ".onnx": {torch.float32},
    ".xml": {torch.float32},
    ".pt2": {torch.float32, torch.float64},  # half precision rounds more than the check allows
}
Arrays = list[NDArray[Any]]
Runner = Callable[[Sequence[NDArray[Any]]], Arrays]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | tuple[object, ...] | None = None,
    int8: Images | None = None,
) -> float:
    """Write a network, compressed or not, as a file for deployment.

    Args:
        model: Any module whose arguments are tensors; it is left as it is.
        path: Its ending says what is written: ".onnx", ".xml" (OpenVINO; the weights lie beside it as ".bin") or ".pt2"
            (torch.export).
        example_inputs: Arguments of one run. By default what timm or torchvision knows of the model. The first axis of
            a single tensor is the batch, which may have any size later.
        int8: Unlabelled images, normalized as for evaluation: weights and activations become 8-bit integers whose
            ranges these images show. ONNX only.

    Returns:
        The largest difference between outputs of the file and of the network, relative to the largest output. At most
        1e-4; with int8, whatever it is: measure agreement with `batude-fx evaluate`'s images.

    Raises:
        ExportError: The ending is unknown, a library is missing, the network cannot be exported, or the file computes
            something else.
        DiscoveryError: Nothing is known of the model's input, and none was given.
        CalibrationError: The images are empty, not finite or of the wrong shape.

    Source: `torch.onnx.export(dynamo=True)`, `openvino.convert_model`, `onnxruntime.quantization.quantize_static`.
    """
    path = Path(path)
    check_path(path, int8=int8 is not None)
    example = resolve_inputs(model, example_inputs)
    # Files have no memory format; torch would write views of what is channels-last as gathers.
    inputs = tuple(one.cpu().contiguous() for one in example if isinstance(one, Tensor))
    if not inputs or len(inputs) < len(example):
        raise ExportError(
            f"{type(model).__name__} takes other arguments than tensors; export the part that takes them."
        )
    if odd := {one.dtype for one in model.parameters() if one.is_floating_point()} - _DTYPES[path.suffix]:
        raise ExportError(
            f"{path}: {type(model).__name__} holds {odd.pop()}, which cannot be written; use model.float()."
        )
    images = None if int8 is None else _arrays(int8, inputs)
    with _beside(path) as folder, _quiet():
        written = folder / path.name
        try:
            network = fold(model, example).cpu().requires_grad_(requires_grad=False)
            if images is not None:
                equalize_(network, track(map(torch.from_numpy, images), "equalizing", len(images)))
            run = _WRITERS[path.suffix](network, inputs, written, images)
            original = copy_model(model).cpu()  # not the folded one: folding is held to it, too
            original.eval()
            gaps = [_difference(original, run, _batch(inputs, size)) for size in _sizes(inputs)]
            difference = float(np.max(gaps))  # NaN if one of them is
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} cannot be written as {path}: {type(error).__name__}: {first_line(error)}. "
                "Where its flow depends on values, export the part that does not."
            ) from error
        if int8 is None and not difference <= TOLERANCE:
            raise ExportError(
                f"{path}: its outputs differ from those of {type(model).__name__} by {difference:.1e} of the largest, "
                f"{TOLERANCE:.0e} is allowed; nothing was written. Try another format."
            )
        for file in sorted(folder.iterdir(), key=lambda file: file.suffix == path.suffix):  # the weights first
            file.replace(path.parent / file.name)
    return difference


def check_path(path: Path, *, int8: bool) -> None:
    """Say what can be said before anything is computed.

    Args:
        path: As for `export`.
        int8: Whether it is to be quantized.

    Raises:
        ExportError: Nothing can be written there, in this form or without further libraries.
    """
    ending = path.suffix
    if ending not in _WRITERS:
        raise ExportError(f"{path}: nothing is written for the ending {path.suffix!r}; use {', '.join(_WRITERS)}.")
    if missing := [name for name in _NEEDS[ending] if find_spec(name) is None]:
        raise ExportError(f"{path} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if int8 and ending != ".onnx":
        raise ExportError(f"{path}: int8 is written as ONNX only, which OpenVINO reads, too; use the ending .onnx.")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give a file.")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk that the file will be on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}. Choose another place.") from error
    with folder as name:
        yield Path(name)


def _arrays(images: Images, inputs: tuple[Tensor, ...]) -> Arrays:
    """Batches of images, of the size that the file will take."""
    arrays = []
    for (batch,) in image_batches(images, inputs):
        shape = tuple(cast("Tensor", batch).shape[1:])
        if shape != tuple(inputs[0].shape[1:]):
            raise CalibrationError(
                f"int8 images are {shape}, the file takes {tuple(inputs[0].shape[1:])}; resize them, or give "
                "example_inputs= of their size."
            )
        arrays.append(cast("Tensor", batch).cpu().numpy())
    if not arrays:
        raise CalibrationError("int8 got no images; give some dozens, unlabelled.")
    return arrays


def _dynamic(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the first axis is a batch: several arguments may share it, or not."""
    return len(inputs) == 1 and inputs[0].ndim > 1


def _sizes(inputs: tuple[Tensor, ...]) -> Sequence[int]:
    return _BATCHES if _dynamic(inputs) else (0,)


def _batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Example inputs (size, ...), each image a little different; as they are where there is no batch axis."""
    if not _dynamic(inputs):
        return tuple(one.clone() for one in inputs)
    image = inputs[0][:1]
    noise = torch.randn(size, *image.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu").to(image)
    return (image + noise,) if image.is_floating_point() else (image.expand(size, *image.shape[1:]),)


def _difference(network: nn.Module, run: Runner, inputs: tuple[Tensor, ...]) -> float:
    """The largest one between two outputs, relative to the largest output."""
    arrays = [one.numpy().copy() for one in inputs]  # a network may work on its input in place
    with torch.no_grad():
        expected = [leaf for leaf in tree_leaves(network(*inputs)) if isinstance(leaf, Tensor)]
    found = [torch.from_numpy(np.asarray(one)) for one in run(arrays)]
    if [one.shape for one in found] != [one.shape for one in expected]:
        raise ExportError(
            f"outputs are {[tuple(one.shape) for one in found]}, not {[tuple(o.shape) for o in expected]}"
        )
    return float(np.max([_gap(*pair) for pair in zip(expected, found, strict=True)]))


def _gap(expected: Tensor, found: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest finite value; infinities must be the same."""
    expected, found = expected.double(), found.double()
    gap = torch.where((expected == found) | (expected.isnan() & found.isnan()), 0, (expected - found).abs())
    size = expected[expected.isfinite()].abs()
    return float(gap.max()) / max(float(size.max()) if len(size) else 0, 1e-12)


def _write_pt2(network: nn.Module, inputs: tuple[Tensor, ...], path: Path, _: Arrays | None) -> Runner:
    torch.export.save(_program(network, inputs), path)
    program = torch.export.load(path).module()

    def run(arrays: Sequence[NDArray[Any]]) -> Arrays:
        leaves = tree_leaves(program(*map(torch.from_numpy, arrays)))
        return [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)]

    return run


def _write_onnx(network: nn.Module, inputs: tuple[Tensor, ...], path: Path, images: Arrays | None) -> Runner:
    network.to(memory_format=torch.contiguous_format)
    written = torch.onnx.export(
        _program(network, inputs), input_names=[f"input{index or ''}" for index in range(len(inputs))],
        dynamic_shapes=_axes(inputs), dynamo=True, verbose=False,
    )  # fmt: skip
    cast("Any", written).save(path, external_data=False)
    if images is not None:
        quantize(path, images)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _write_openvino(network: nn.Module, inputs: tuple[Tensor, ...], path: Path, images: Arrays | None) -> Runner:
    import openvino

    source = path.with_suffix(".onnx")
    _write_onnx(network, inputs, source, images)
    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)
    source.unlink()
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda arrays: list(compiled(list(arrays)).values())


_WRITERS: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...], Path, Arrays | None], Runner]] = {
    ".onnx": _write_onnx,
    ".xml": _write_openvino,
    ".pt2": _write_pt2,
}


def _program(network: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    # An axis of length one counts as fixed.
    return torch.export.export(network, _batch(inputs, 2), dynamic_shapes=_axes(inputs))


def _axes(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any]] | None:
    """Which axes may have any size, and their names in the file."""
    return ({0: torch.export.Dim("batch")},) if _dynamic(inputs) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell of their steps, and warn of their own parts."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
