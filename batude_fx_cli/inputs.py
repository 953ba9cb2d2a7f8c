"""Turn the options of the command line into what batude_fx takes: a network, a budget, images, a plan."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

import batude_fx
from batude_fx import BatudeError, Budget, BudgetError, Plan, UnsupportedError
from batude_fx.compression.planning import Options, choose
from batude_fx.errors import first_line
from batude_fx.evaluation.image_folder import batches, image_paths
from batude_fx.graph.example_inputs import example_inputs, image_of_size, remember_input_size_


def parse_limits(budget: str | None, params: str | None, latency: str | None, agreement: str | None) -> Budget:
    """Return the budget that the four options set.

    Raises:
        BudgetError: When none is given, or one cannot be read.
    """
    if (budget, params, latency, agreement) == (None, None, None, None):
        raise BudgetError("no limit is given; use --budget, --params, --latency or --agreement, such as --budget 0.5.")
    if budget is not None and (params, latency, agreement) == (None, None, None):
        return Budget.parse(budget)
    return Budget(flops=budget, params=params, latency=latency, agreement=agreement)


def network_by_name(name: str, device: str, *, pretrained: bool, input_size: int | None = None) -> nn.Module:
    """Create a network in eval mode on a device. Weights that are not trained are the same in every call.

    Args:
        name: Its name, as `batude_fx.create` takes it.
        device: Device of torch.
        pretrained: Whether to load trained weights.
        input_size: Side of the images in pixels that it will be used on; None for the size in its configuration.

    Raises:
        UnsupportedError: When the device cannot be used on this machine, or the network takes no images of this size.
        BatudeError: When no network has this name, or it cannot be built.
    """
    try:
        target = torch.device(device)
        torch.empty(1, device=target).cpu()  # "meta" has no values to copy
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"device {device!r} cannot be used here: {first_line(error)}. Use --device cpu."
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # torch.hub prints its downloads, which are no part of --json
            torch.manual_seed(0)
            network = batude_fx.create(name, pretrained=pretrained).to(target)
            network.eval()
            _set_input_size_(network, name, input_size)
            return network
    except BatudeError:
        raise
    except Exception as error:  # timm raises many kinds for broken configs and names
        way_out = " All commands but evaluate can do without trained weights: --no-pretrained." if pretrained else ""
        raise BatudeError(f"{name!r} cannot be built: {type(error).__name__}: {first_line(error)}.{way_out}") from error


def _set_input_size_(network: nn.Module, name: str, side: int | None) -> None:
    """Have example inputs, photos and saved folders of a network in another size than that of its configuration."""
    if side is None:
        return
    image = example_inputs(network).image
    if image is None:
        raise UnsupportedError(f"{name!r} does not take one batch of images; leave out --input-size.")
    remember_input_size_(network, image_of_size(network, (image.shape[1], side, side)))
    (resized,) = example_inputs(network).tensors()
    if tuple(resized.shape[2:]) != (side, side):
        built_for = " x ".join(map(str, resized.shape[2:]))
        raise UnsupportedError(f"{name!r} is built for {built_for} pixels, not {side}; leave out --input-size.")


def calibration_source(option: str, count: int) -> Callable[[nn.Module], Any]:
    """Return a function from a network to its calibration images for `plan`; a folder is listed at once.

    Args:
        option: "none", "synthetic", or a folder of images.
        count: Number of images to take from the folder, evenly spread.

    Raises:
        CalibrationError: When the folder is missing or holds no image.
    """
    if option in {"none", "synthetic"}:
        return lambda _: None if option == "none" else option
    paths = image_paths(Path(option), count)
    return lambda network: batches(network, paths)


def make_plan(
    network: nn.Module, budget: Budget, source: Callable[[nn.Module], Any], layers: str, include: list[str] | None,
    exclude: list[str] | None, round_to: Any,  # noqa: ANN401 - a number or "auto"
) -> Plan:  # fmt: skip
    """Choose ranks with the options of the command line; nothing is built yet."""
    options = Options(
        calibration=source(network), layers=layers, include=include or (), exclude=exclude or (), round_to=round_to
    )
    return choose(network, budget, options)
