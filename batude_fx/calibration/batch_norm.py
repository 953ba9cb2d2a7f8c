"""Batch-norm statistics re-estimated on synthetic images.

The statistics of synthetic images are wrong for the network in one respect that can be mended: its batch-norm layers
hold the mean and the variance of every channel on the images that it was trained on, and synthetic images have others.
With batch-norms that normalize by the statistics of the synthetic images instead, every layer receives channels with
the mean and the variance of training; only their correlations are those of synthetic images.

Source: batch-norm as a memory of the training images: H. Yin et al., "Dreaming to Distill", CVPR 2020,
https://arxiv.org/abs/1912.08795.
"""

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from batude_fx.errors import CalibrationError, first_line
from batude_fx.graph.surgery import copy_model
from batude_fx.support.inputs import Inputs

ModelT = TypeVar("ModelT", bound=nn.Module)

_SINGLE_VALUE = "Expected more than 1 value per channel"  # what torch's batch-norm says in training mode


def renormalize(model: ModelT, batches: Sequence[Inputs]) -> ModelT:
    """Return a copy of the model whose batch-norm layers hold the statistics of some batches.

    Args:
        model: Left as it is.
        batches: Arguments of the model.

    Returns:
        A copy in eval mode. It is `model` itself if that has no batch-norm with running statistics, or if a batch-norm
        gets a single value per channel, which has no variance.
    """
    if not any(_has_running_statistics(module) for module in model.modules()):
        return model
    adapted = copy_model(model)
    adapted.eval()
    for module in adapted.modules():
        if _has_running_statistics(module):
            norm = cast("nn.BatchNorm2d", module)
            if isinstance(norm, nn.SyncBatchNorm):
                norm.__class__ = _OwnBatchNorm  # type: ignore[assignment]
            norm.reset_running_stats()
            norm.momentum = None  # running statistics are then the plain average over the batches
            norm.train()
    try:
        with torch.random.fork_rng(devices=()), torch.no_grad():  # the copy may draw from the random generators
            for batch in batches:
                batch.copies().run(adapted)
    except ValueError as error:
        if _SINGLE_VALUE in str(error):
            return model
        raise CalibrationError(
            f"the model does not run on calibration images while its batch-norms measure them: {first_line(error)}."
        ) from error
    for module, original in zip(adapted.modules(), model.modules(), strict=True):
        if _has_running_statistics(module):
            module.__class__ = original.__class__
            cast("nn.BatchNorm2d", module).momentum = cast("nn.BatchNorm2d", original).momentum
    adapted.eval()
    return adapted


class _OwnBatchNorm(nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the class that all batch-norms derive from
    """A `SyncBatchNorm` that measures the images of its own process: all processes see the same calibration images."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - as torch calls it
        pass


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that `renormalize` sets, qualified name to value."""
    norms = {name: module for name, module in model.named_modules() if _has_running_statistics(module)}
    return {f"{name}.{key}": value for name, norm in norms.items() for key, value in norm.named_buffers(recurse=False)}


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats  # noqa: SLF001
