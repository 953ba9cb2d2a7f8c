"""From what the user typed to what the verbs of batude_fx take: a network, a budget, calibration images, a plan."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

import batude_fx
from batude_fx import BatudeError, Budget, Plan, UnsupportedError
from batude_fx.errors import first_line
from batude_fx.evaluation.image_folder import batches, image_paths


def parse_limits(budget: str | None, params: str | None, latency: str | None) -> Budget:
    """The budget of the three options.

    Raises:
        BudgetError: None is given, or one cannot be read.
    """
    if budget is not None and params is None and latency is None:
        return Budget.parse(budget)
    return Budget(flops=budget, params=params, latency=latency)


def network_by_name(name: str, device: str, *, pretrained: bool) -> nn.Module:
    """The network in eval mode on a device; fresh weights are the same ones in every call.

    Raises:
        UnsupportedError: The device cannot be used here.
        BatudeError: No network has this name, or it cannot be built.
    """
    try:
        target = torch.device(device)
        torch.empty(1, device=target).cpu()  # "meta" has no values to copy
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"device {device!r} cannot be used here: {first_line(error)}. Use --device cpu."
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # torch.hub says there what it fetches, in the way of --json
            torch.manual_seed(0)
            network = batude_fx.create(name, pretrained=pretrained).to(target)
            network.eval()
            return network
    except BatudeError:
        raise
    except Exception as error:  # timm's readers of foreign configs and names raise all kinds
        way_out = " All but evaluate do without its weights: --no-pretrained." if pretrained else ""
        raise BatudeError(f"{name!r} cannot be built: {type(error).__name__}: {first_line(error)}.{way_out}") from error


def calibration_source(wanted: str, count: int) -> Callable[[nn.Module], Any]:
    """A function from a network to what `plan` calibrates it with; a folder is looked into at once.

    Args:
        wanted: "none", "synthetic", or a folder of images.
        count: How many images of the folder, spread over it.

    Raises:
        CalibrationError: The folder is missing or holds no image.
    """
    if wanted in {"none", "synthetic"}:
        return lambda _: None if wanted == "none" else wanted
    paths = image_paths(Path(wanted), count)
    return lambda network: batches(network, paths)


def make_plan(
    network: nn.Module, budget: Budget, source: Callable[[nn.Module], Any], layers: str, include: list[str] | None,
    exclude: list[str] | None, round_to: Any,  # noqa: ANN401 - a number or "auto"
) -> Plan:  # fmt: skip
    """`batude_fx.plan` with the options of the command line."""
    return batude_fx.plan(
        network, budget, calibration=source(network), layers=layers, include=include or (), exclude=exclude or (),
        round_to=round_to,
    )  # fmt: skip
