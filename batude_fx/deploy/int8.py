"""Eight bits: channels between the parts of a Tucker module are equalized, then onnxruntime quantizes the file.

A mode's leading directions carry far more than its last ones, so that one range for all of them, as activations get in
eight bits, leaves the last ones a few steps. Nothing stands between the parts of a Tucker module but a channel axis, so
a channel may be divided by any number there if the next part multiplies by it: the network computes the same, and half
of what the ranges differ by is moved from the activation into the weight.

Source: G. Xiao et al., "SmoothQuant", ICML 2023, https://arxiv.org/abs/2211.10438, section 4, equation 4 with
alpha 0.5; M. Nagel et al., ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.1. Quantization: B. Jacob et al.,
CVPR 2018, https://arxiv.org/abs/1712.05877, by `onnxruntime.quantization`.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batude_fx.support.hooks import observe_calls
from batude_fx.support.progress import track
from batude_fx.tucker.dense_layers import to_canonical
from batude_fx.tucker.modules import TuckerModule

_PERCENTILE = 99.999


@torch.no_grad()
def equalize_(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Share out ranges between the parts of all Tucker modules; the outputs stay the same.

    Args:
        network: In eval mode; the Tucker modules that a batch passes through are changed in place.
        batches: Images (N, C, H, W) that show the ranges.
    """
    pairs = [pair for module in network.modules() if isinstance(module, TuckerModule) for pair in _pairs(module)]
    largest: dict[nn.Module, Tensor] = {}

    def note_largest(first: nn.Module, _args: object, _kwargs: object, output: Tensor) -> None:
        axis = 1 if getattr(first, "kernel_size", ()) else -1
        values = output.abs().movedim(axis, 0).flatten(1).amax(1)  # (C,)
        largest[first] = torch.maximum(largest.get(first, values), values)

    with observe_calls({first: first for first, _ in pairs}, after=note_largest):
        for batch in batches:
            network(batch)
    for first, second in pairs:
        if first in largest:
            _share_(first, second, largest[first])


def _pairs(module: TuckerModule) -> Iterable[tuple[nn.Module, nn.Module]]:
    """Parts that follow each other."""
    parts = (module.factor_in, module.core, module.factor_out)
    return pairwise(part for part in parts if not isinstance(part, nn.Identity))


def _share_(first: nn.Module, second: nn.Module, largest: Tensor) -> None:
    """Divide the channels (C,) between two parts by the root of what activation and weight differ by."""
    before, after = (to_canonical(cast("Tensor", part.weight), part) for part in (first, second))
    groups, channels = before.shape[:2]
    weights = after.abs().transpose(1, 2).flatten(2).amax(2)  # (groups, channels)
    scale = (largest.view(groups, channels) / weights).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)  # a channel of zeros
    before.div_(scale.view(groups, channels, *[1] * (before.ndim - 2)))
    after.mul_(scale.view(groups, 1, channels, *[1] * (after.ndim - 3)))


def quantize(path: Path, images: Sequence[NDArray[Any]]) -> None:
    """Quantize an ONNX file in place: weights per channel, activations per tensor.

    A range holds all but one of 100,000 values: those that are larger in magnitude are not worth the steps.

    Args:
        path: The file; its input is called "input".
        images: Batches (N, C, H, W) whose values count.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """One batch at a time, as the values of all layers are kept until it ends."""

        def __init__(self) -> None:
            self.batches = track(images, "quantizing")
            self.left = 0

        def __len__(self) -> int:
            return len(images)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = end_index - start_index

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            self.left -= 1
            return None if self.left < 0 else {"input": next(self.batches)}

    quant_pre_process(path, path, skip_symbolic_shape=True)
    reader = Reader()
    with closing(reader.batches):
        quantization.quantize_static(
            path, path, reader, per_channel=True, calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": _PERCENTILE, "CalibStridedMinMax": 1},
        )  # fmt: skip
