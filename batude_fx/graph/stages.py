"""The stages of a network: the modules whose outputs sum up what a part of it has computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from batude_fx.support.hooks import observe_calls
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy

_LEAST_NDIM = 3  # (N, C, L) or (N, L, C)
_Size = tuple[int, ...]


@dataclass
class _Call:
    """The first call of a module.

    Attributes:
        size: Extent of its output without batch and channels; (C,) or (L,) for an output of three axes.
        count: How often the module was called.
    """

    size: _Size
    count: int = 1


@torch.no_grad()
def find_stages(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return the qualified names of the modules whose outputs are those of the stages, in the order of their calls.

    timm's networks name them in `feature_info`. Of any other network it is, for every size of feature maps that occurs,
    the module that is called last among those that lie least deep and have an output of that size.

    Args:
        model: Any module, which is left as it is.
        inputs: Arguments of one run.

    Returns:
        The names; none for a network whose outputs have no extent, such as a perceptron. A module that is called
        several times is none of them.
    """
    calls: dict[str, _Call] = {}

    def record(name: str, _args: object, _kwargs: object, output: object) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < _LEAST_NDIM:
            return
        if name in calls:
            calls[name].count += 1
        else:
            calls[name] = _Call(tuple(output.shape[2:] if output.ndim > _LEAST_NDIM else output.shape[1:2]))

    with private_copy(model) as copied:
        modules = {name: module for name, module in copied.named_modules() if name}
        with observe_calls(modules, after=record):
            inputs.copies().run(copied)
    called_once = {name: call.size for name, call in calls.items() if call.count == 1}
    declared = [name for name in _declared(model) if name in called_once]
    return declared or _last_of_each_size(called_once)


def _declared(model: nn.Module) -> list[str]:
    """Return the names in timm's `feature_info`, which is a list of dicts, or an object that makes one."""
    info = getattr(model, "feature_info", None)
    entries = info if isinstance(info, list) else getattr(info, "info", [])
    return [entry["module"] for entry in entries if isinstance(entry, Mapping) and "module" in entry]


def _last_of_each_size(sizes: Mapping[str, _Size]) -> list[str]:
    last: dict[_Size, str] = {}
    for name, size in sizes.items():  # in the order in which the calls end
        if prod(size) > 1 and (size not in last or name.count(".") <= last[size].count(".")):
            last[size] = name
    return [name for name in sizes if name in last.values()]
