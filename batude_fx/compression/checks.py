"""Checks of a model and of the options of `plan`, before anything is computed."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batude_fx.errors import CalibrationError, DiscoveryError, SelectionError, UnsupportedError
from batude_fx.graph.discovery import PART_OF_TUCKER
from batude_fx.graph.site_table import Sites
from batude_fx.graph.surgery import refuse_wrappers
from batude_fx.support.inputs import Inputs
from batude_fx.support.user_warning import warn_user
from batude_fx.training.run import check_accelerate

_BYTES_OF_FLOAT32 = 4


def check_options(round_to: int | Literal["auto"], calibration: object) -> None:
    """Refuse options of `plan` whose values mean nothing.

    Raises:
        SelectionError: `round_to` is neither a number from 1 on nor "auto".
        CalibrationError: `calibration` is a text other than "synthetic".
    """
    if round_to != "auto" and (type(round_to) is not int or round_to < 1):
        raise SelectionError(f'round_to={round_to!r} is not a rank multiple; use 1 or more, 8 by default, or "auto".')
    if isinstance(calibration, str) and calibration != "synthetic":
        raise CalibrationError(f'calibration={calibration!r}: give images, "synthetic", or None for weights only.')


def check_example(inputs: Inputs) -> None:
    """Refuse an example input that holds no image, or values that no output can be compared on.

    Raises:
        DiscoveryError: It does.
    """
    image = inputs.only_tensor
    if image is not None and not image.numel():
        raise DiscoveryError(f"example_inputs has shape {tuple(image.shape)} and no values; give one image or more.")
    if any(tensor.is_floating_point() and tensor.isnan().any() for tensor in inputs.tensors()):
        raise DiscoveryError("example_inputs holds NaN; give an image, or torch.zeros of its shape.")


def with_dtype_hint(error: DiscoveryError, model: nn.Module, inputs: Inputs) -> DiscoveryError:
    """Return the error of a model that does not run, with the way out if its input has another dtype."""
    example = inputs.only_tensor
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if example is None or weight is None or example.dtype == weight.dtype:
        return error
    return DiscoveryError(
        f"{error} The example is {example.dtype} and the weights are {weight.dtype}: pass images.to({weight.dtype})."
    )


def check_model(model: object) -> None:
    """Refuse what has no weights that could be decomposed, and modes of torch that would spoil the result.

    Raises:
        UnsupportedError: With the reason and the way out.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{model!r} is no model; batude_fx.create makes one from a name.")
    if torch.is_inference_mode_enabled():
        raise UnsupportedError(
            "inside torch.inference_mode() calibration gets no gradients, and the result could never be trained; call "
            "compress outside. torch.no_grad() is no hindrance."
        )
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise UnsupportedError(
            "inside torch.autocast() weights would be decomposed in half precision; compress outside."
        )
    refuse_wrappers(model, "compress")
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if not is_lazy(parameter):  # discovery says what to do about lazy ones
            _check_parameter(name, parameter)


def warn_of_tucker_modules(sites: Sites) -> None:
    """Warn that a network was compressed already, as only what is dense in it can become smaller.

    Warns:
        UserWarning: When it was.
    """
    parts = [site.name for site in sites if site.skip_reason == PART_OF_TUCKER]
    if parts:
        warn_user(
            f"the network was compressed before: {len(parts)} parts of Tucker modules, {parts[0]} first, stay as they "
            "are, and the budget is a share of its present costs. To make it smaller, compress the original to the "
            "final budget."
        )


def check_constant_sizes(sites: Sites, model: nn.Module) -> None:
    """Refuse to time a model whose work depends on values.

    Raises:
        UnsupportedError: When it does, as in a detector.
    """
    if sites.sizes_vary:
        raise UnsupportedError(
            f"{type(model).__name__} may compute more or less for other values, so its time cannot be foreseen; give "
            "flops or params, and a number for round_to."
        )


def _check_parameter(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise UnsupportedError(f"{name} is on the meta device and has no values; load the weights first.")
    if parameter.is_inference():
        raise UnsupportedError(f"{name} was made inside torch.inference_mode(), without gradients; make it outside.")
    if parameter.is_floating_point() and parameter.dtype.itemsize < _BYTES_OF_FLOAT32:
        raise UnsupportedError(
            f"{name} is {parameter.dtype}, too coarse to decompose; compress model.float(), "
            f"then convert the result back with .to({parameter.dtype})."
        )
    if not parameter.isfinite().all():
        raise UnsupportedError(f"{name} holds NaN or infinite values; load other weights.")


def check_restorable(*, has_images: bool) -> None:
    """Refuse to restore without images, or without accelerate, before anything is computed.

    With generated images, a network agrees better with its original on these, and worse on photos: ResNet-50 at half of
    its flops diverged by 0.50 nats on photos after that, and by 0.41 before.

    Raises:
        CalibrationError: When there are no images of the user's.
        TrainingError: When accelerate is not installed.
    """
    if not has_images:
        raise CalibrationError(
            "a network is restored with images of its task, as generated ones would make it worse on others. Pass "
            "unlabelled images by calibration=, a hundred or more."
        )
    check_accelerate()
