"""Give the outputs of every replaced site the mean and the variance they had, in the order of the forward pass.

A low-rank layer loses the variance of the directions it drops, and each next layer receives what the ones before it
have lost already; over fifty layers the signal fades. Here each site's output is compared with the original's while
one batch passes through the compressed network, and shifted and scaled per channel before it goes on. The correction
costs nothing later: it is folded into the last factor and its bias.

Unlike the re-estimation of batch-norm statistics this leaves near-dead channels alone: the gain is bounded, and it
compares the two networks on the same images instead of trusting few images to stand for all.

Source: a bounded, per-layer form of the moment matching in M. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.2.
"""

from collections.abc import Callable, Collection
from typing import cast

import torch
from torch import Tensor, nn

from batude_fx.modules import TuckerModule

LEAST_GAIN, MOST_GAIN = 0.5, 2.0


def match_moments_(
    original: nn.Module, compressed: nn.Module, names: Collection[str], inputs: tuple[object, ...]
) -> None:
    """Fold per-channel shifts and gains into the Tucker modules of a compressed network.

    Args:
        original: The dense network, in eval mode.
        compressed: Its compressed copy, in eval mode; the Tucker modules at `names` are changed in place. Each needs
            a bias.
        names: Qualified names of the replaced sites.
        inputs: Arguments of one run, with as many images as memory allows: both networks see them at once.
    """
    wanted: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str, output: Tensor) -> None:
        if name not in wanted:
            wanted[name] = _moments(output, _channel_axis(compressed.get_submodule(name)))

    def correct(name: str, output: Tensor) -> Tensor:
        if name not in wanted:  # a further call of a shared site, corrected at its first
            return output
        module = cast("TuckerModule", compressed.get_submodule(name))
        return _correct_(module, output, *wanted.pop(name))

    with torch.no_grad():
        _run_listening(original, names, inputs, remember)
        _run_listening(compressed, names, inputs, correct)


def _correct_(module: TuckerModule, output: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Scale the last part's rows and shift its bias; returns the output as it now is."""
    axis = _channel_axis(module)
    own_mean, own_deviation = _moments(output, axis)
    gain = (deviation / own_deviation).nan_to_num(1.0).clamp(LEAST_GAIN, MOST_GAIN)  # (C_out,)
    factors = module.factors()
    last = cast("Tensor", factors.core if factors.factor_out is None else factors.factor_out)
    bias = cast("Tensor", factors.bias)
    last.mul_(gain.view(*last.shape[:2], *[1] * (last.ndim - 2)))
    bias.sub_(own_mean).mul_(gain).add_(mean)
    return ((output.movedim(axis, -1) - own_mean) * gain + mean).movedim(-1, axis)


def _moments(output: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, (C,) each."""
    channels = output.movedim(axis, 0).flatten(1)
    deviation, mean = torch.std_mean(channels, dim=1, correction=0)
    return mean, deviation


def _channel_axis(module: nn.Module) -> int:
    return 1 if cast("TuckerModule", module).kernel_size else -1


def _run_listening(
    model: nn.Module,
    names: Collection[str],
    inputs: tuple[object, ...],
    listener: Callable[[str, Tensor], Tensor | None],
) -> None:
    """Run the model; the listener hears the output of every named submodule and may replace it."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: listener(name, output)
        )
        for name in names
    ]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
