"""Batch-norm statistics re-estimated on synthetic images.

The statistics of synthetic images are wrong for the network in one respect that can be mended: its batch-norm layers
hold the mean and the variance of every channel on the images that it was trained on, and synthetic images have others.
With batch-norms that normalize by the statistics of the synthetic images instead, every layer receives channels with
the mean and the variance of training; only their correlations are those of synthetic images.

Source: batch-norm as a memory of the training images: H. Yin et al., "Dreaming to Distill", CVPR 2020,
https://arxiv.org/abs/1912.08795.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import CalibrationError, first_line
from batude_fx.graph.surgery import copy_model
from batude_fx.support.hooks import observe_calls
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import random_states_kept

ModelT = TypeVar("ModelT", bound=nn.Module)


@torch.no_grad()
def renormalize(model: ModelT, batches: Sequence[Inputs]) -> ModelT:
    """Return a copy of the model whose batch-norm layers hold the statistics of some batches.

    While they are measured, each batch-norm normalizes by the statistics of the batch, as in training, and all else
    runs in eval mode. They are measured before the layer is called, not by the layer: so they do not depend on its
    class, and of several processes that train together each may measure for itself.

    Args:
        model: Left as it is.
        batches: Arguments of the model.

    Returns:
        A copy in eval mode. It is `model` itself if that has no batch-norm with running statistics, or if a batch-norm
        gets a single value per channel, which has no variance.

    Raises:
        CalibrationError: When the model does not run on a batch.
    """
    if not any(_has_running_statistics(module) for module in model.modules()):
        return model
    adapted = copy_model(model)
    adapted.eval()
    norms: dict[nn.BatchNorm2d, nn.Module] = {
        cast("nn.BatchNorm2d", module): module for module in adapted.modules() if _has_running_statistics(module)
    }
    moments: dict[nn.BatchNorm2d, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in norms}
    has_single_value = False

    def measure(norm: nn.BatchNorm2d, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal has_single_value
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))  # (N, C, ...)
        values = x.movedim(1, 0).flatten(1).to(norm.running_var)  # (C, n)
        count = values.shape[1]
        has_single_value |= count <= 1
        variance, mean = torch.var_mean(values, 1, correction=0)
        moments[norm].append((mean, variance * count / max(1, count - 1)))  # without bias, as torch's layers keep it
        cast("Tensor", norm.running_mean).copy_(mean)
        cast("Tensor", norm.running_var).copy_(variance)

    with random_states_kept(devices=()), observe_calls(norms, before=measure):
        for batch in batches:
            try:
                batch.copies().run(adapted)
            except (RuntimeError, ValueError, AssertionError, IndexError) as error:
                raise CalibrationError(
                    f"the model does not run on calibration images while its batch-norms are measured: "
                    f"{first_line(error)}."
                ) from error
    if has_single_value:
        return model
    for norm, measured in moments.items():
        if measured:
            means, variances = zip(*measured, strict=True)
            cast("Tensor", norm.running_mean).copy_(torch.stack(means).mean(0))
            cast("Tensor", norm.running_var).copy_(torch.stack(variances).mean(0))
    return adapted


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that `renormalize` sets, qualified name to value."""
    norms = {name: module for name, module in model.named_modules() if _has_running_statistics(module)}
    return {f"{name}.{key}": value for name, norm in norms.items() for key, value in norm.named_buffers(recurse=False)}


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats  # noqa: SLF001
