"""Quantization to 8-bit integers: equalize the channels inside Tucker modules, then let onnxruntime quantize the file.

Activations are quantized with one range for all channels of a tensor. Between the parts of a Tucker module, the
channels of the leading directions are far larger than the last ones, for which few steps of that range remain. No
activation function lies between two parts, so a channel may be divided by any s there if the next part multiplies by
it: with z the first part's output and V the weight of the second, V z = (V diag(s)) (diag(1 / s) z). SmoothQuant takes
s = sqrt(max |z| / max |V|) per channel: then both ranges become sqrt(max |z| max |V|).

Weights get 7 bits, from -64 to 64. On x86 processors without VNNI, onnxruntime multiplies by the instruction
`vpmaddubsw`, which adds two products of 8-bit activations and weights in 16 bits and cuts off what is more: up to
2 * 255 * 127 = 64,770, where 16 bits end at 32,767. With 7 bits the sum is at most 2 * 255 * 64 = 32,640, so that the
file gives the same outputs on every processor.

Source: G. Xiao et al., "SmoothQuant", ICML 2023, https://arxiv.org/abs/2211.10438, section 4, equation 4 with
alpha 0.5; M. Nagel et al., ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.1. Quantization: B. Jacob et al.,
CVPR 2018, https://arxiv.org/abs/1712.05877, by `onnxruntime.quantization`; 7 bits: its documentation, "When to use
reduce-range".
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batude_fx.support.hooks import observe_calls
from batude_fx.support.inputs import Inputs
from batude_fx.support.progress import track
from batude_fx.tucker.dense_layers import to_canonical
from batude_fx.tucker.modules import TuckerModule

_PERCENTILE = 99.999  # of the values of an activation; a range holds all but one of 100,000


@torch.no_grad()
def equalize_(network: nn.Module, batches: Iterable[Inputs]) -> None:
    """Equalize the ranges of activations and weights inside all Tucker modules; the outputs stay the same.

    Args:
        network: In eval mode; the Tucker modules that are called are changed in place.
        batches: Images that the ranges are measured on.
    """
    pairs = [pair for module in network.modules() if isinstance(module, TuckerModule) for pair in _pairs(module)]
    largest: dict[nn.Module, Tensor] = {}

    def update_largest(first: nn.Module, _args: object, _kwargs: object, output: Tensor) -> None:
        axis = 1 if getattr(first, "kernel_size", ()) else -1
        values = output.abs().movedim(axis, 0).flatten(1).amax(1)  # (C,)
        largest[first] = torch.maximum(largest.get(first, values), values)

    with observe_calls({first: first for first, _ in pairs}, after=update_largest):
        for batch in batches:
            batch.copies().run(network)
    for first, second in pairs:
        if first in largest:
            _equalize_pair_(first, second, largest[first])


def _pairs(module: TuckerModule) -> Iterable[tuple[nn.Module, nn.Module]]:
    """Return each part with the part that follows it."""
    parts = (module.factor_in, module.core, module.factor_out)
    return pairwise(part for part in parts if not isinstance(part, nn.Identity))


def _equalize_pair_(first: nn.Module, second: nn.Module, largest: Tensor) -> None:
    """Divide the output channels of the first part by s, and multiply the weight of the second.

    Args:
        first: The part whose output z lies between the two.
        second: The part that follows.
        largest: (C,) max |z| of every channel.
    """
    before, after = (to_canonical(cast("Tensor", part.weight), part) for part in (first, second))
    groups, channels = before.shape[:2]
    weights = after.abs().transpose(1, 2).flatten(2).amax(2)  # (groups, channels)
    scale = (largest.view(groups, channels) / weights).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)  # no scale for zeros
    before.div_(scale.view(groups, channels, *[1] * (before.ndim - 2)))
    after.mul_(scale.view(groups, 1, channels, *[1] * (after.ndim - 3)))


def quantize(path: Path, name: str, images: Sequence[NDArray[Any]]) -> None:
    """Quantize an ONNX file in place: weights per channel, activations per tensor.

    The ranges of activations leave out the largest of 100,000 values, which gives all others finer steps.

    Args:
        path: The file.
        name: Name of its input.
        images: Batches (N, C, H, W) that the ranges of activations are measured on.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Gives onnxruntime one batch at a time, as it keeps the activations of all batches of a range."""

        def __init__(self) -> None:
            self.batches = track(images, "quantizing")
            self.batches_left = 0

        def __len__(self) -> int:
            return len(images)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.batches_left = end_index - start_index

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            self.batches_left -= 1
            return None if self.batches_left < 0 else {name: next(self.batches)}

    quant_pre_process(path, path, skip_symbolic_shape=True)
    reader = Reader()
    with closing(reader.batches), _without_prints():
        quantization.quantize_static(
            path, path, reader, per_channel=True, reduce_range=True,
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": _PERCENTILE, "CalibStridedMinMax": 1},
        )  # fmt: skip


@contextmanager
def _without_prints() -> Iterator[None]:
    """Silence what onnxruntime prints while it calibrates; what other threads print meanwhile is printed."""
    from onnxruntime.quantization import calibrate

    calibrate.print = lambda *_: None
    try:
        yield
    finally:
        vars(calibrate).pop("print", None)
