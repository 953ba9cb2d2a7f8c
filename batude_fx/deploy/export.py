"""Write a network as a file that runs without batude_fx: ONNX, OpenVINO or torch.export.

Batch-norms are folded first. The file is written to a temporary folder, run on the example input in batches of one and
three, and compared with the network before it is moved to its place; so no file is left that computes something else.

Source: torch.onnx (the exporter based on torch.export); OpenVINO's `convert_model`; for int8, see `deploy.int8`.
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
from batude_fx.support.model_state import exclusive
from batude_fx.support.progress import track

TOLERANCE = 1e-4  # largest difference of outputs that is allowed without int8, relative to the largest output
_BATCH_SIZES = (1, 3)  # batch sizes that the file is checked with
_REQUIRED_PACKAGES = {
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".xml": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    ".pt2": (),
}
_DTYPES = {
    ".onnx": {torch.float32},
    ".xml": {torch.float32},
    ".pt2": {torch.float32, torch.float64},  # half precision rounds by more than TOLERANCE
}
Arrays = list[NDArray[Any]]
Runner = Callable[[Sequence[NDArray[Any]]], Arrays]


@exclusive
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
        path: The file; its ending chooses the format: ".onnx", ".xml" (OpenVINO; the weights are written to a ".bin"
            file beside it) or ".pt2" (torch.export).
        example_inputs: Arguments of one forward pass. By default, those that timm or torchvision declare for the model.
            If they are a single tensor, its first axis is the batch, which may have any size in the file.
        int8: Unlabelled images, normalized as for evaluation. Weights and activations become 8-bit integers; the
            ranges of the activations are measured on these images. For ONNX only.

    Returns:
        The largest difference between outputs of the file and of the network, relative to the largest output. It is at
        most 1e-4, except with int8, where it is not limited: evaluate such a file on images of your own.

    Raises:
        ExportError: The ending is unknown, a package is missing, the network cannot be exported, or the file computes
            something else.
        DiscoveryError: No `example_inputs` are given, and none are declared for the model.
        CalibrationError: The images are empty, not finite or of the wrong shape.

    Source: `torch.onnx.export(dynamo=True)`, `openvino.convert_model`, `onnxruntime.quantization.quantize_static`.
    """
    path = Path(path)
    check_path(path, int8=int8 is not None)
    example = resolve_inputs(model, example_inputs)
    # Files have no memory format: the exporter would write views of channels-last tensors as gathers.
    inputs = tuple(argument.cpu().contiguous() for argument in example if isinstance(argument, Tensor))
    if not inputs or len(inputs) < len(example):
        raise ExportError(
            f"{type(model).__name__} takes other arguments than tensors; export the part that takes only tensors."
        )
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if unsupported := dtypes - _DTYPES[path.suffix]:
        raise ExportError(
            f"{path}: {type(model).__name__} holds {unsupported.pop()}, which cannot be written; use model.float()."
        )
    images = None if int8 is None else _image_arrays(int8, inputs)
    with _temporary_folder_beside(path) as folder, _quiet():
        written = folder / path.name
        try:
            network = fold(model, example).cpu().requires_grad_(requires_grad=False)
            if images is not None:
                equalize_(network, track(map(torch.from_numpy, images), "equalizing", len(images)))
            run = _WRITERS[path.suffix](network, inputs, written, images)
            original = copy_model(model).cpu()  # not the folded network, so that folding is checked too
            original.eval()
            differences = [_difference(original, run, _batch(inputs, size)) for size in _batch_sizes(inputs)]
            difference = float(np.max(differences))  # NaN if one of them is NaN
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} cannot be written as {path}: {type(error).__name__}: {first_line(error)}. "
                "If its control flow depends on values, export the part that does not."
            ) from error
        if int8 is None and not difference <= TOLERANCE:
            raise ExportError(
                f"{path}: its outputs differ from those of {type(model).__name__} by {difference:.1e} of the largest, "
                f"{TOLERANCE:.0e} is allowed; nothing was written. Try another format."
            )
        for file in sorted(folder.iterdir(), key=lambda file: file.suffix == path.suffix):  # weights first
            file.replace(path.parent / file.name)
    return difference


def check_path(path: Path, *, int8: bool) -> None:
    """Refuse a path that `export` cannot write to, before anything is computed.

    Args:
        path: The file to write.
        int8: Whether the network will be quantized.

    Raises:
        ExportError: The ending is unknown or has no int8 form, a package is missing, or the path is a folder.
    """
    ending = path.suffix
    if ending not in _WRITERS:
        raise ExportError(f"{path}: there is no format for the ending {path.suffix!r}; use {', '.join(_WRITERS)}.")
    if missing := [name for name in _REQUIRED_PACKAGES[ending] if find_spec(name) is None]:
        raise ExportError(f"{path} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if int8 and ending != ".onnx":
        raise ExportError(f"{path}: int8 is written as ONNX only, which OpenVINO reads too; use the ending .onnx.")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give a file.")


@contextmanager
def _temporary_folder_beside(path: Path) -> Iterator[Path]:
    """Make a temporary folder on the disk that the file will be on, so that the file can be moved in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}. Choose another place.") from error
    with folder as name:
        yield Path(name)


def _image_arrays(images: Images, inputs: tuple[Tensor, ...]) -> Arrays:
    """Return batches of images; refuse images of another size than the file will take."""
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


def _has_batch_axis(inputs: tuple[Tensor, ...]) -> bool:
    """Return whether the first axis is a batch; the first axes of several tensors need not be the same batch."""
    return len(inputs) == 1 and inputs[0].ndim > 1


def _batch_sizes(inputs: tuple[Tensor, ...]) -> Sequence[int]:
    return _BATCH_SIZES if _has_batch_axis(inputs) else (0,)  # `_batch` needs no size then


def _batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Return example inputs (size, ...) with noise, different for each image; copies if there is no batch axis."""
    if not _has_batch_axis(inputs):
        return tuple(tensor.clone() for tensor in inputs)
    image = inputs[0][:1]
    noise = torch.randn(size, *image.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu").to(image)
    return (image + noise,) if image.is_floating_point() else (image.expand(size, *image.shape[1:]),)


def _difference(network: nn.Module, run: Runner, inputs: tuple[Tensor, ...]) -> float:
    """Return the largest difference between outputs of a network and of its file, relative to the largest output."""
    arrays = [tensor.numpy().copy() for tensor in inputs]  # a network may work on its input in place
    with torch.no_grad():
        expected = [leaf for leaf in tree_leaves(network(*inputs)) if isinstance(leaf, Tensor)]
    outputs = [torch.from_numpy(np.asarray(array)) for array in run(arrays)]
    shapes, expected_shapes = ([tuple(tensor.shape) for tensor in tensors] for tensors in (outputs, expected))
    if shapes != expected_shapes:
        raise ExportError(f"outputs are {shapes}, not {expected_shapes}")
    return float(np.max([_relative_difference(*pair) for pair in zip(expected, outputs, strict=True)]))


def _relative_difference(expected: Tensor, output: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest finite value that is expected.

    Infinities and NaN differ by 0 from the same, and by infinity or NaN from anything else.
    """
    expected, output = expected.double(), output.double()
    same = (expected == output) | (expected.isnan() & output.isnan())
    difference = torch.where(same, 0, (expected - output).abs())
    magnitudes = expected[expected.isfinite()].abs()
    return float(difference.max()) / max(float(magnitudes.max()) if len(magnitudes) else 0, 1e-12)


def _write_pt2(network: nn.Module, inputs: tuple[Tensor, ...], path: Path, _: Arrays | None) -> Runner:
    torch.export.save(_trace(network, inputs), path)
    program = torch.export.load(path).module()

    def run(arrays: Sequence[NDArray[Any]]) -> Arrays:
        leaves = tree_leaves(program(*map(torch.from_numpy, arrays)))
        return [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)]

    return run


def _write_onnx(network: nn.Module, inputs: tuple[Tensor, ...], path: Path, images: Arrays | None) -> Runner:
    network.to(memory_format=torch.contiguous_format)
    program = torch.onnx.export(
        _trace(network, inputs), input_names=[f"input{index or ''}" for index in range(len(inputs))],
        dynamic_shapes=_dynamic_axes(inputs), dynamo=True, verbose=False,
    )  # fmt: skip
    cast("Any", program).save(path, external_data=False)
    if images is not None:
        quantize(path, images)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
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


def _trace(network: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    # A batch of two, as torch.export takes an axis of length one to be fixed.
    return torch.export.export(network, _batch(inputs, 2), dynamic_shapes=_dynamic_axes(inputs))


def _dynamic_axes(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any]] | None:
    """Return the axes that may have any size, each with its name in the file; None if there are none."""
    return ({0: torch.export.Dim("batch")},) if _has_batch_axis(inputs) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log messages, warnings and printed lines of the exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
