"""What 7 bits of the weights cost in place of 8: a real ResNet-50 at half of its flops, quantized both ways.

Weights of 8 bits are right on processors with VNNI only; see `batude_fx.deploy.int8`.

python -m benchmarks.int8_bits
"""

import platform
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch
from onnxruntime import quantization
from rich.console import Console
from rich.table import Table

import batude_fx
from batude_fx.support.numbers import wilson_interval
from tests.real.inputs import resnet50_timm, shop_photos

IMAGES, HELD_OUT, TURNS = 128, 400, 30


def main() -> None:
    """Compress, quantize with both numbers of bits, and print one row for each."""
    model, photos, held_out = resnet50_timm().eval(), shop_photos("train", IMAGES), shop_photos("test", HELD_OUT)
    small = batude_fx.compress(model, 0.5, calibration=photos)
    with torch.no_grad():
        expected = torch.cat([small(batch) for batch in torch.split(held_out, 20)]).numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {}
    with TemporaryDirectory() as folder:
        for bits in (7, 8):
            path = Path(folder) / f"{bits}.onnx"
            with mock.patch.object(quantization, "quantize_static", _with_bits(bits)):
                batude_fx.export(small, path, int8=photos)
            sessions[bits] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    times = _milliseconds(sessions, held_out[:1].numpy())
    table = Table(
        "bits", "same class as the float network", "squared error of the outputs", "ms, one image, one thread"
    )
    for bits, session in sessions.items():
        outputs = np.concatenate(
            [session.run(None, {"input": batch.numpy()})[0] for batch in torch.split(held_out, 20)]
        )
        agree = int((outputs.argmax(1) == expected.argmax(1)).sum())
        low, high = wilson_interval(agree, HELD_OUT)
        error = ((outputs - expected) ** 2).sum() / (expected**2).sum()
        shown = f"{agree / HELD_OUT:.1%} ({low:.1%} to {high:.1%})"
        table.add_row(str(bits), shown, f"{error:.2%}", f"{times[bits]:.1f}")
    console = Console()
    console.print(table)
    console.print(f"{datetime.now(UTC):%Y-%m-%d}, {_processor()}, {HELD_OUT} photos, calibrated with {IMAGES} others")


def _with_bits(bits: int) -> Any:  # noqa: ANN401 - onnxruntime's function
    original = quantization.quantize_static
    return lambda *args, **options: original(*args, **{**options, "reduce_range": bits == 7})


def _milliseconds(sessions: dict[int, Any], image: np.ndarray[Any, Any]) -> dict[int, float]:
    """Return the median time of each session; they take turns."""
    times: dict[int, list[float]] = {bits: [] for bits in sessions}
    for _ in range(TURNS):
        for bits, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"input": image})
            times[bits].append(1000 * (time.perf_counter() - start))
    return {bits: float(np.median(values)) for bits, values in times.items()}


def _processor() -> str:
    with closing(Path("/proc/cpuinfo").open(encoding="utf-8")) as lines:
        names = (line.partition(": ")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())


if __name__ == "__main__":
    main()
