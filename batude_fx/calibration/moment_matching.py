"""Give the outputs of every replaced site the mean and the variance they had, in the order of the forward pass.

A low-rank layer loses the variance of the directions it drops, and each next layer receives what the ones before it
have lost already; over fifty layers the signal fades. Here each site's output is compared with the original's while
images pass through the compressed network, and shifted and scaled per channel before it goes on. The correction costs
nothing later: it is folded into the last factor and its bias.

Unlike the re-estimation of batch-norm statistics this leaves near-dead channels alone: the gain is bounded, and it
compares the two networks on the same images instead of trusting few images to stand for all.

Source: a bounded, per-layer form of the moment matching in M. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.2.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from batude_fx.support.hooks import observe_calls
from batude_fx.support.model_state import run_on_copies
from batude_fx.tucker.modules import TuckerModule

LEAST_GAIN, MOST_GAIN = 0.5, 2.0


def match_moments_(
    original: nn.Module, compressed: nn.Module, names: Collection[str], batches: Iterable[tuple[object, ...]]
) -> None:
    """Fold per-channel shifts and gains into the Tucker modules of a compressed network.

    Args:
        original: The dense network, in eval mode.
        compressed: Its compressed copy, in eval mode; the Tucker modules at `names` are changed in place. Each needs
            a bias.
        names: Qualified names of the replaced sites.
        batches: Arguments of runs. Every batch is corrected by its own moments on its way, and the averages over the
            batches are what stays.
    """
    matches: dict[str, list[_Match]] = {name: [] for name in names}
    wanted: dict[str, _Moments] = {}
    given: dict[str, _Match] = {}

    def remember(name: str, output: Tensor) -> None:
        if name not in wanted and output.numel():  # a detector may find no box
            wanted[name] = _moments(output)

    def correct(name: str, output: Tensor) -> Tensor:
        if name not in wanted or not output.numel():  # the original did not come this way, or this one does not
            return output
        if name not in given:  # further calls of a shared site are corrected as its first
            given[name] = _Match(wanted[name], _moments(output))
            matches[name].append(given[name])
        return given[name].corrected(output)

    with torch.no_grad():
        for batch in batches:
            wanted.clear()
            given.clear()
            _run(original, names, batch, _on_channels(remember, compressed))
            _run(compressed, names, batch, _on_channels(correct, compressed))
        for name, seen in matches.items():
            if seen:
                _fold_(cast("TuckerModule", compressed.get_submodule(name)), _average(seen))


@dataclass(frozen=True)
class _Moments:
    """Of every channel, (C,) each."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class _Match:
    """The moments that a site's output should have, and those that it has."""

    wanted: _Moments
    own: _Moments

    def gain(self) -> Tensor:
        return (self.wanted.variance / self.own.variance).sqrt().nan_to_num(1.0).clamp(LEAST_GAIN, MOST_GAIN)  # (C,)

    def corrected(self, output: Tensor) -> Tensor:
        """(..., C)."""
        return ((output - self.own.mean) * self.gain() + self.wanted.mean).to(output.dtype)


def _moments(output: Tensor) -> _Moments:
    """Of an output (..., C)."""
    if output.dtype.itemsize < torch.float32.itemsize:  # of autocast inside the model
        output = output.float()
    variance, mean = torch.var_mean(output, dim=tuple(range(output.ndim - 1)), correction=0)
    return _Moments(mean, variance)


def _average(seen: Collection[_Match]) -> _Match:
    def mean(moments: list[_Moments]) -> _Moments:
        return _Moments(
            torch.stack([one.mean for one in moments]).mean(0), torch.stack([one.variance for one in moments]).mean(0)
        )

    return _Match(mean([match.wanted for match in seen]), mean([match.own for match in seen]))


def _fold_(module: TuckerModule, match: _Match) -> None:
    factors, gain = module.factors(), match.gain()
    last = cast("Tensor", factors.core if factors.factor_out is None else factors.factor_out)  # (g, C_out / g, ...)
    bias = cast("Tensor", factors.bias)
    last.mul_(gain.view(*last.shape[:2], *[1] * (last.ndim - 2)))
    bias.sub_(match.own.mean).mul_(gain).add_(match.wanted.mean)


def _on_channels(
    listener: Callable[[str, Tensor], Tensor | None], compressed: nn.Module
) -> Callable[[str, Tensor], Tensor | None]:
    """The listener for outputs (N, C, ...) or (C, ...) of convolutions, that hears and returns (..., C)."""

    def listen(name: str, output: Tensor) -> Tensor | None:
        spatial = len(cast("TuckerModule", compressed.get_submodule(name)).kernel_size)
        axis = output.ndim - 1 - spatial
        result = listener(name, output.movedim(axis, -1))
        return None if result is None else result.movedim(-1, axis)

    return listen


def _run(
    model: nn.Module,
    names: Collection[str],
    inputs: tuple[object, ...],
    receive: Callable[[str, Tensor], Tensor | None],
) -> None:
    """Run the model; a function gets the output of every named submodule and may replace it."""
    layers = {name: model.get_submodule(name) for name in names}
    with observe_calls(layers, after=lambda name, _args, _kwargs, output: receive(name, output)):
        run_on_copies(model, inputs)
