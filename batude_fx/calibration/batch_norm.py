"""Images for calibration: the user's, checked and in small batches, and procedural ones; and what they measure, mixed.

Without images of the user, procedural ones stand in (`synthetic`). Their statistics are wrong for the network in one
respect that can be mended: its batch-norm layers know the mean and variance of every channel on the images it was
trained on. So the network that is measured normalizes by the statistics of the *synthetic* images: then every layer
receives channels with the mean and variance it knows from training, and only their correlations are synthetic.

Source: batch-norm as a memory of the training images: H. Yin et al., "Dreaming to Distill", CVPR 2020,
https://arxiv.org/abs/1912.08795.
"""

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from batude_fx.calibration.images import Inputs
from batude_fx.graph.surgery import copy_model
from batude_fx.support.model_state import eval_and_restore, run_on_copies

ModelT = TypeVar("ModelT", bound=nn.Module)


def renormalize(model: ModelT, batches: Sequence[Inputs]) -> ModelT:
    """A copy of the model whose batch-norm layers hold the statistics of these batches.

    Args:
        model: Left as it is.
        batches: Arguments of the model.

    Returns:
        A copy in eval mode; `model` itself where it has no batch-norm with running statistics, or one that sees too
        little to normalize.
    """
    if not any(_has_running_statistics(module) for module in model.modules()):
        return model
    adapted = copy_model(model)
    adapted.eval()
    for module in adapted.modules():
        if _has_running_statistics(module):
            norm = cast("nn.BatchNorm2d", module)
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
    try:
        with eval_and_restore(model), torch.no_grad():  # for the random generators, which the copy may draw from
            for batch in batches:
                run_on_copies(adapted, batch)
    except ValueError:  # a layer that sees one value per channel has no variance to normalize by
        return model
    for module, before in zip(adapted.modules(), model.modules(), strict=True):
        if _has_running_statistics(module):
            cast("nn.BatchNorm2d", module).momentum = cast("nn.BatchNorm2d", before).momentum
    adapted.eval()
    return adapted


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Name to value of the buffers that `normalized_by` sets."""
    norms = {name: module for name, module in model.named_modules() if _has_running_statistics(module)}
    return {f"{name}.{key}": value for name, norm in norms.items() for key, value in norm.named_buffers(recurse=False)}


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats  # noqa: SLF001
