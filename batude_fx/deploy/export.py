"""Write a network as a file that runs without batude_fx: ONNX, OpenVINO or torch.export.

Batch-norms are folded first. The file is written to a temporary folder, run on images of the size of the example input
in batches of one and three, and on a larger one where sizes are free. Its outputs are compared with the network's
before it is moved to its place; so no file is left that computes something else.

Source: torch.onnx (the exporter based on torch.export); OpenVINO's `convert_model`; for int8, see `deploy.int8`.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.calibration.images import Images, image_batches
from batude_fx.calibration.plausibility import ImageCheck
from batude_fx.deploy.comparison import Comparison, Runner, compare
from batude_fx.deploy.fold import fold
from batude_fx.deploy.int8 import equalize_, quantize
from batude_fx.deploy.metadata import describe_images
from batude_fx.errors import CalibrationError, ExportError, first_line
from batude_fx.graph.example_inputs import resolve_inputs
from batude_fx.support.atomic_files import check_writable, move, temporary_folder
from batude_fx.support.inputs import ExampleInputs, Inputs
from batude_fx.support.model_state import exclusive, private_copy
from batude_fx.support.progress import track

TOLERANCE = 1e-4  # largest difference of outputs that is allowed without int8, relative to the largest output
_BATCH_SIZES = (1, 3)  # batch sizes that the file is checked with
_LEAST_SIDE = 33  # of images of any size: most networks end with a map of one position below that, a special case
_MOST_HALVINGS = 32  # height and width may have to be multiples of this: some networks halve them five times
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


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: ExampleInputs | None = None,
    int8: Images | None = None,
    dynamic_size: bool = False,
) -> Comparison:
    """Write a network, compressed or not, as a file for deployment.

    The metadata of an ONNX file, and "model_info" of an OpenVINO file, say how images are resized and normalized, under
    the names that timm's configs have.

    Args:
        model: Any module whose arguments are tensors; it is left as it is.
        path: The file; its ending chooses the format: ".onnx", ".xml" (OpenVINO; the weights are written to a ".bin"
            file beside it) or ".pt2" (torch.export).
        example_inputs: Arguments of one forward pass: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments. By default, those that timm or torchvision declare for the model. If they are a single tensor,
            its first axis is the batch, which may have any size in the file.
        int8: Unlabelled images, normalized as for evaluation. Weights and activations become integers of 8 bits; the
            ranges of the activations are measured on these images. For ONNX only.
        dynamic_size: Let height and width of the images have any size above 32 pixels in the file; or any multiple of
            32, 16 or less where the network needs that, of the largest that divides those of the example.

    Returns:
        Which inputs the file takes, and how its outputs compare with those of the network: with int8 on the given
        images, else on noise.
        The largest difference is at most 1e-4 of the largest output, except with int8, where it is not limited.

    Raises:
        ExportError: The ending is unknown, a package is missing, the network cannot be exported, it needs images of one
            size, or the file computes something else.
        DiscoveryError: No `example_inputs` are given, and none are declared for the model.
        CalibrationError: The images are empty, not finite or of the wrong shape.

    Warns:
        UserWarning: The images for int8 are few, or not normalized as the network expects.

    Source: `torch.onnx.export(dynamo=True)`, `openvino.convert_model`, `onnxruntime.quantization.quantize_static`.
    """
    path = Path(path)
    check_path(path, int8=int8 is not None)
    request = _Request(_cpu_inputs(model, example_inputs))
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if unsupported := dtypes - _DTYPES[path.suffix]:
        raise ExportError(
            f"{path}: {type(model).__name__} holds {unsupported.pop()}, which cannot be written; use model.float()."
        )
    if dynamic_size and request.inputs.image is None:
        raise ExportError(f"{type(model).__name__} does not take one batch of images; leave out dynamic_size.")
    images = [] if int8 is None else _checked_images(model, int8, request.inputs)
    with _temporary_folder_beside(path) as folder:
        try:
            network = fold(model, request.inputs).cpu().requires_grad_(requires_grad=False)
            if images:
                equalize_(network, track(images, "equalizing", len(images)))
            with exclusive, _quiet():
                request, run = _write(network, request, folder / path.name, images, dynamic_size=dynamic_size)
            with private_copy(model) as original:  # not the folded network, so that folding is checked too
                comparison = compare(original.cpu(), run, request.examples())
                if images:
                    comparison = compare(original, run, track(images, "comparing", len(images)))
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} cannot be written as {path}: {type(error).__name__}: {first_line(error)}. "
                "If its control flow depends on values, export the part that does not."
            ) from error
        if int8 is None and not comparison.difference <= TOLERANCE:
            raise ExportError(
                f"{path}: its outputs differ from those of {type(model).__name__} by {comparison.difference:.1e} of "
                f"the largest, {TOLERANCE:.0e} is allowed; nothing was written. Try another format."
            )
        _move_all(folder, path)
    return replace(comparison, inputs=request.shapes())


def check_path(path: Path, *, int8: bool) -> None:
    """Refuse a path that `export` cannot write to, before anything is computed.

    Args:
        path: The file to write.
        int8: Whether the network will be quantized.

    Raises:
        ExportError: The ending is unknown or has no int8 form, a package is missing, or the path is a folder or cannot
            be written.
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
    try:
        check_writable(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def _temporary_folder_beside(path: Path) -> Iterator[Path]:
    """Make a temporary folder on the disk that the file will be on, so that the file can be moved in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) as folder:
            yield folder
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> ExportError:
    return ExportError(f"{path} cannot be written: {error.strerror}. Choose another place.")


def _move_all(folder: Path, path: Path) -> None:
    """Move the written files to their places.

    A file of weights without its .xml is no network; the .xml with the weights of another one would be a wrong one.
    """
    files = sorted(folder.iterdir(), key=lambda file: file.suffix == path.suffix)
    if len(files) > 1:
        path.unlink(missing_ok=True)
    for file in files:
        move(file, path.parent / file.name)


def _cpu_inputs(model: nn.Module, given: ExampleInputs | None) -> Inputs:
    """Return the example input on the CPU; refuse arguments that are no tensors."""
    inputs = resolve_inputs(model, given)
    values = (*inputs.args, *inputs.kwargs.values())
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise ExportError(
            f"{type(model).__name__} takes other arguments than tensors; export the part that takes only tensors."
        )
    # Files have no memory format: the exporter would write views of channels-last tensors as gathers.
    return inputs.map(lambda tensor: tensor.cpu().contiguous())


def _checked_images(model: nn.Module, images: Images, inputs: Inputs) -> list[Inputs]:
    """Return batches of images; refuse images of another size than the file will take, and warn of odd ones."""
    batches, (example,) = [], inputs.tensors()
    for batch in ImageCheck(model, image_batches(images, inputs), inputs, name="int8", purpose="ranges measured on"):
        shape, expected = (tuple(tensor.shape[1:]) for tensor in (*batch.tensors(), example))
        if shape != expected:
            raise CalibrationError(
                f"int8 images are {shape}, the file takes {expected}; resize them, or give example_inputs= of their "
                "size."
            )
        batches.append(batch)
    if not batches:
        raise CalibrationError("int8 got no images; give some dozens, unlabelled.")
    return batches


@dataclass(frozen=True)
class _Request:
    """What the file will take.

    Attributes:
        inputs: Example input; tensors on the CPU.
        multiple: Number that height and width may be any multiple of; None where they are fixed.
    """

    inputs: Inputs
    multiple: int | None = None

    @property
    def names(self) -> list[str]:
        """The names of the file's inputs."""
        return [*(f"input{index or ''}" for index in range(len(self.inputs.args))), *self.inputs.kwargs]

    def shapes(self) -> dict[str, tuple[str, ...]]:
        """Return the shape of each input of the file by its name; what may have any size has a name in it."""
        free = {0: "batch"} if self._batch_tensor is not None else {}
        if self.multiple is not None:
            free |= {2: "height", 3: "width"}
        values = zip(self.names, (*self.inputs.args, *self.inputs.kwargs.values()), strict=True)
        return {
            name: tuple(free.get(axis, str(size)) for axis, size in enumerate(value.shape))
            for name, value in values
            if isinstance(value, Tensor)
        }

    @property
    def _batch_tensor(self) -> Tensor | None:
        """The tensor whose first axis is a batch; the first axes of several tensors need not be the same batch."""
        tensor = self.inputs.only_tensor
        return tensor if tensor is not None and tensor.ndim > 1 else None

    def axes(self) -> Any:  # noqa: ANN401 - torch.export's
        """Return the axes that may have any size, each with its name in the file; None if there are none."""
        if self._batch_tensor is None:
            return None
        dims: dict[int, Any] = {0: torch.export.Dim("batch")}
        if self.multiple == 1:
            sides = zip(("height", "width"), self._batch_tensor.shape[2:], strict=True)
            dims |= {
                axis: torch.export.Dim(name, min=min(_LEAST_SIDE, side)) for axis, (name, side) in enumerate(sides, 2)
            }
        elif self.multiple is not None:
            dims |= {2: self.multiple * torch.export.Dim("height"), 3: self.multiple * torch.export.Dim("width")}
        return dict.fromkeys(self.inputs.kwargs, dims) if self.inputs.kwargs else (dims,)

    def examples(self) -> Iterator[Inputs]:
        """Yield inputs to check the file with, of several sizes where these are free."""
        if self._batch_tensor is None:
            yield self.inputs
            return
        yield from (self.noise(size) for size in _BATCH_SIZES)
        if self.multiple is not None:
            yield self.noise(1, larger=2 * self.multiple if self.multiple > 1 else 32)

    def noise(self, size: int, larger: int = 0) -> Inputs:
        """Return a batch of images (size, ...) with noise, different for each image; copies if they are no floats.

        Args:
            size: Number of images.
            larger: Pixels by which the images are larger than the example, in height; twice as many in width.
        """
        image = cast("Tensor", self._batch_tensor)[:1]
        if larger:
            _, _, height, width = image.shape
            image = nn.functional.interpolate(image, (height + larger, width + 2 * larger))
        noise = torch.randn(size, *image.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu").to(image)
        return self.inputs.with_tensor(
            image + noise if image.is_floating_point() else image.expand(size, *image.shape[1:]).clone()
        )

    def trace(self, network: nn.Module) -> torch.export.ExportedProgram:
        """Trace a network with a batch of two, as torch.export takes an axis of length one to be fixed."""
        example = self.inputs if self._batch_tensor is None else self.noise(2)
        return torch.export.export(network, example.args, dict(example.kwargs), dynamic_shapes=self.axes())


def _write(
    network: nn.Module, request: _Request, path: Path, images: Sequence[Inputs], *, dynamic_size: bool
) -> tuple[_Request, Runner]:
    """Write the file, with the least restriction on the size of the images that the network allows."""
    write = _WRITERS[path.suffix]
    if not dynamic_size:
        return request, write(network, request, path, images)
    reasons = []
    common = math.gcd(*cast("Tensor", request.inputs.image).shape[2:], _MOST_HALVINGS)
    for multiple in dict.fromkeys((1, common)):
        wider = _Request(request.inputs, multiple)
        try:
            *_, larger = wider.examples()
            with torch.no_grad():
                larger.run(network)
            return wider, write(network, wider, path, images)
        except (OSError, MemoryError, torch.OutOfMemoryError):  # which say nothing of the network
            raise
        except Exception as error:  # noqa: BLE001 - torch.export raises many kinds
            reasons.append(first_line(error))
    size = " x ".join(map(str, cast("Tensor", request.inputs.image).shape[2:]))
    raise ExportError(
        f"{type(network).__name__} cannot be written for images of any size: {reasons[0]}. Leave out dynamic_size; "
        f"then the file takes images of {size} pixels."
    )


def _write_pt2(network: nn.Module, request: _Request, path: Path, _: Sequence[Inputs]) -> Runner:
    # By way of the memory, as torch's own writer ends the process when the disk is full.
    content = BytesIO()
    torch.export.save(request.trace(network), content)
    path.write_bytes(content.getbuffer())
    program = torch.export.load(path).module()
    return lambda inputs: [leaf for leaf in tree_leaves(inputs.run(program)) if isinstance(leaf, Tensor)]


def _write_onnx(network: nn.Module, request: _Request, path: Path, images: Sequence[Inputs]) -> Runner:
    network.to(memory_format=torch.contiguous_format)
    program = torch.onnx.export(
        request.trace(network), input_names=request.names, dynamic_shapes=request.axes(), dynamo=True, verbose=False
    )
    cast("Any", program).save(path, external_data=False)
    if images:
        quantize(path, request.names[0], [batch.tensors()[0].numpy() for batch in images])
    import onnx
    import onnxruntime

    written = onnx.load(path)
    onnx.helper.set_model_props(written, describe_images(network, request.inputs))
    onnx.save(written, path)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> list[Tensor]:
        arrays = [tensor.numpy() for tensor in inputs.tensors()]
        return [torch.as_tensor(array) for array in session.run(None, dict(zip(request.names, arrays, strict=True)))]

    return run


def _write_openvino(network: nn.Module, request: _Request, path: Path, images: Sequence[Inputs]) -> Runner:
    import openvino

    source = path.with_suffix(".onnx")
    _write_onnx(network, request, source, images)
    converted = openvino.convert_model(source)
    for key, text in describe_images(network, request.inputs).items():
        converted.set_rt_info(text, ["model_info", key])
    openvino.save_model(converted, path, compress_to_fp16=False)
    source.unlink()
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Inputs) -> list[Tensor]:
        outputs = compiled([tensor.numpy() for tensor in inputs.tensors()]).values()
        return [torch.from_numpy(output.copy()) for output in outputs]

    return run


_WRITERS: Mapping[str, Callable[[nn.Module, _Request, Path, Sequence[Inputs]], Runner]] = {
    ".onnx": _write_onnx,
    ".xml": _write_openvino,
    ".pt2": _write_pt2,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log messages and warnings of the exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
