"""Moment matching: every replaced site gets back the mean and the variance that its output channels had.

A low-rank layer loses the variance of the directions it drops, and each layer receives what the layers before it have
lost already; over fifty layers the signal fades. So images pass through the original and through the compressed
network, and the output of each site is shifted and scaled per channel before it goes on to the next layer. Afterwards
the correction is folded into the last factor and its bias, where it costs nothing.

Re-estimated batch-norm statistics would correct the variance too, but they would also blow up near-dead channels, and
trust few images to stand for all. Here the gain is bounded, and both networks are compared on the same images.

Source: a bounded form, with gains, of the bias correction in M. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.2.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from batude_fx.support.hooks import observe_calls
from batude_fx.support.inputs import Inputs
from batude_fx.tucker.modules import TuckerModule

LEAST_GAIN, MOST_GAIN = 0.5, 2.0


def match_moments_(
    original: nn.Module, compressed: nn.Module, names: Collection[str], batches: Iterable[Inputs]
) -> None:
    """Fold per-channel shifts and gains into the Tucker modules of a compressed network.

    The sites are matched in the order of the forward pass, each on what the corrected sites before it give. Every batch
    is corrected by its own moments on its way; the moments averaged over the batches give the correction that stays.

    Args:
        original: The dense network, in eval mode.
        compressed: Its compressed copy, in eval mode; the Tucker modules at `names` are changed in place. Each needs
            a bias.
        names: Qualified names of the replaced sites.
        batches: Arguments of the networks.
    """
    modules = {name: cast("TuckerModule", compressed.get_submodule(name)) for name in names}
    matches: dict[str, list[_Match]] = {name: [] for name in names}
    with torch.no_grad():
        for batch in batches:
            targets = _measure_targets(original, modules, batch)
            for name, match in _match_on_the_way(compressed, modules, targets, batch).items():
                matches[name].append(match)
        for name, matches_of_site in matches.items():
            if matches_of_site:
                _fold_(modules[name], _average(matches_of_site))


@dataclass(frozen=True)
class _Moments:
    """The mean and the variance of every channel, (C,) each."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class _Match:
    """The correction of one site: output y becomes gain (y - mean of y) + mean of the original's output.

    Attributes:
        target: Moments of the original's output.
        actual: Moments of the compressed network's output.
    """

    target: _Moments
    actual: _Moments

    def gain(self) -> Tensor:
        """Return the ratio of the standard deviations within its bounds, (C,); 1 where neither output varies."""
        return (self.target.variance / self.actual.variance).sqrt().nan_to_num(1.0).clamp(LEAST_GAIN, MOST_GAIN)

    def corrected(self, output: Tensor) -> Tensor:
        """Return a corrected output (..., C)."""
        return ((output - self.actual.mean) * self.gain() + self.target.mean).to(output.dtype)


def _measure_targets(original: nn.Module, modules: Mapping[str, TuckerModule], batch: Inputs) -> dict[str, _Moments]:
    """Run the original, and return the moments of the first output of every site that it calls."""
    targets: dict[str, _Moments] = {}

    def measure(name: str, _args: object, _kwargs: object, output: Tensor) -> None:
        if name not in targets and output.numel():  # a detector that finds no box
            targets[name] = _moments(output.movedim(_channel_axis(output, modules[name]), -1))

    with observe_calls({name: original.get_submodule(name) for name in modules}, after=measure):
        batch.copies().run(original)
    return targets


def _match_on_the_way(
    compressed: nn.Module,
    modules: Mapping[str, TuckerModule],
    targets: Mapping[str, _Moments],
    batch: Inputs,
) -> dict[str, _Match]:
    """Run the compressed network with the output of every site corrected, and return the corrections.

    Further calls of a shared site get the correction of its first call.
    """
    matches: dict[str, _Match] = {}

    def correct(name: str, _args: object, _kwargs: object, output: Tensor) -> Tensor:
        if name not in targets or not output.numel():  # not called by the original, or no box found here
            return output
        axis = _channel_axis(output, modules[name])
        channels_last = output.movedim(axis, -1)
        if name not in matches:
            matches[name] = _Match(targets[name], _moments(channels_last))
        return matches[name].corrected(channels_last).movedim(-1, axis)

    with observe_calls(modules, after=correct):
        batch.copies().run(compressed)
    return matches


def _channel_axis(output: Tensor, module: TuckerModule) -> int:
    """Return the channel axis of an output (N, C, ...) or (C, ...); the last one for a linear layer."""
    return output.ndim - 1 - len(module.kernel_size)


def _moments(output: Tensor) -> _Moments:
    """Return the moments of an output (..., C)."""
    if output.dtype.itemsize < torch.float32.itemsize:  # half precision, from autocast inside the model
        output = output.float()
    variance, mean = torch.var_mean(output, dim=tuple(range(output.ndim - 1)), correction=0)
    return _Moments(mean, variance)


def _average(matches: Collection[_Match]) -> _Match:
    """Return the match of the averaged moments."""

    def mean(moments: list[_Moments]) -> _Moments:
        return _Moments(
            mean=torch.stack([batch.mean for batch in moments]).mean(0),
            variance=torch.stack([batch.variance for batch in moments]).mean(0),
        )

    return _Match(mean([match.target for match in matches]), mean([match.actual for match in matches]))


def _fold_(module: TuckerModule, match: _Match) -> None:
    """Fold a correction into the last part F and the bias b of a Tucker module.

    For y = F z + b, gain (y - actual mean) + target mean = (gain F) z + gain (b - actual mean) + target mean.
    """
    factors, gain = module.factors(), match.gain()
    last = cast("Tensor", factors.core if factors.factor_out is None else factors.factor_out)  # (g, C_out / g, ...)
    bias = cast("Tensor", factors.bias)
    last.mul_(gain.view(*last.shape[:2], *[1] * (last.ndim - 2)))
    bias.sub_(match.actual.mean).mul_(gain).add_(match.target.mean)
