"""A compressed ResNet-50 in every form of deployment: milliseconds, bytes, and agreement with the original.

Run `make bench-deployment`, or `python -m benchmarks.deployment`; about ten minutes on idle cores. The network has
ImageNet weights and is compressed to half of its flops, calibrated with 256 shop photos, with ranks in multiples of 32;
int8 is calibrated with 128 of the photos. Agreement is the share of 400 other photos with the original's class. Each
form is timed on one image and on eight, on one thread, alternating with the original in torch. The exit code is 1 if
the outputs of a file differ from those of torch by more than 1e-4 of the largest, or if int8 loses more than 2
percentage points of agreement.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import batude_fx
from batude_fx.deploy.export import TOLERANCE
from batude_fx.support.timing import time_calls
from benchmarks.published import environment, publish
from tests.real import inputs

KEEP, ROUND_TO, TURNS, INT8_IMAGES, MOST_LOST = 0.5, 32, 11, 128, 0.02
CONSOLE = Console(width=120)

Images = NDArray[np.float32]
Run = Callable[[Images], Images]


def main() -> int:
    """Export, run, print and publish the table."""
    warnings.simplefilter("ignore")
    where = environment()
    CONSOLE.print(where)
    torch.set_num_threads(1)
    model, photos = inputs.resnet50_torchvision(), inputs.shop_photos("train", 256)
    held_out = inputs.shop_photos("test", 400).numpy()
    small = batude_fx.compress(model, KEEP, calibration=photos, round_to=ROUND_TO)
    table = Table(
        "network", "form", "MB", "difference", "agreement", "1 image, ms", "8 images, ms", "",
        title=f"ResNet-50 at {KEEP} of its flops, deployed",
    )  # fmt: skip
    original = classes(torch_run(model), held_out)
    failed = 0
    for name, network in (("original", model), ("compressed", small)):
        with TemporaryDirectory() as folder:
            reference: float | None = None
            for form, (run, size, difference) in forms(network, Path(folder), photos[:INT8_IMAGES]).items():
                agreement = float((classes(run, held_out) == original).mean())
                reference = agreement if reference is None else reference
                exact = "int8" in form or difference <= TOLERANCE
                ok = network is model or (exact and agreement >= reference - MOST_LOST)
                failed += not ok
                times = [seconds(run, torch_run(model), held_out[:batch]) for batch in (1, 8)]
                table.add_row(
                    name, form, f"{size / 1e6:.1f}", f"{difference:.0e}", f"{agreement:.4f}",
                    *(f"{1000 * wall:.1f} ({original_wall / wall:.2f}x)" for wall, original_wall in times),
                    "" if network is model else "ok" if ok else "MISSED",
                )  # fmt: skip
    CONSOLE.print(table)
    publish("deployment", table, f"{where}, one thread measured; times faster than the original in eager torch")
    return int(failed > 0)


def forms(network: nn.Module, folder: Path, photos: torch.Tensor) -> dict[str, tuple[Run, int, float]]:
    """Return, for each form, its function, its bytes and its largest difference from torch."""
    paths = {form: folder / name for form, name in (("ONNX", "a.onnx"), ("OpenVINO", "b.xml"), ("int8", "c.onnx"))}
    gaps = {
        form: batude_fx.export(network, path, int8=photos if form == "int8" else None).difference
        for form, path in paths.items()
    }
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    return {
        "torch, eager": (torch_run(network), size, 0.0),
        "torch, folded": (torch_run(batude_fx.fold(network)), size, 0.0),
        "torch.compile, folded": (torch_run(batude_fx.fold(network), compiled=True), size, 0.0),
        "ONNX Runtime": (onnx_run(paths["ONNX"]), paths["ONNX"].stat().st_size, gaps["ONNX"]),
        "OpenVINO": (openvino_run(paths["OpenVINO"]), (folder / "b.bin").stat().st_size, gaps["OpenVINO"]),
        "ONNX Runtime, int8": (onnx_run(paths["int8"]), paths["int8"].stat().st_size, gaps["int8"]),
        "OpenVINO, int8": (openvino_run(paths["int8"]), paths["int8"].stat().st_size, gaps["int8"]),
    }


def torch_run(network: nn.Module, *, compiled: bool = False) -> Run:
    """Return a function that runs the network in channels-last format."""
    channels_last = network.to(memory_format=torch.channels_last)
    call = torch.compile(channels_last) if compiled else channels_last

    @torch.no_grad()
    def run(images: Images) -> Images:
        return np.asarray(call(torch.from_numpy(images).to(memory_format=torch.channels_last)))

    return run


def onnx_run(path: Path) -> Run:
    """Return a function that runs an ONNX file on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    return lambda images: np.asarray(session.run(None, {"input": images})[0])


def openvino_run(path: Path) -> Run:
    """Return a function that runs a file on one thread, in float32 where it is not quantized."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: np.asarray(compiled([images])[0])


def classes(run: Run, images: Images) -> NDArray[np.int64]:
    """Return the class of every image, (N,), computed in batches of eight."""
    batches = track(np.split(images, len(images) // 8), "running", console=CONSOLE, transient=True)
    return np.concatenate([run(batch).argmax(1) for batch in batches])


def seconds(run: Run, original: Run, images: Images) -> tuple[float, float]:
    """Return the median seconds of a form and of the original in torch, run alternately."""
    ours, theirs = time_calls([partial(run, images), partial(original, images)], TURNS)
    return ours, theirs


if __name__ == "__main__":
    sys.exit(main())
