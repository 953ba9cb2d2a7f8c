"""A compressed network as a folder: `model.safetensors` and `config.json`, in the layout of timm's model folders.

Beside them lies its report (`page`), where the network knows how it was made.

`save` proves that the folder gives the network back, to the bit, before it says so. Nothing in a folder is executed.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from batude_fx.errors import SavedModelError, last_line
from batude_fx.tucker.modules import CHANNELS_LAST, is_channels_last

_TOGETHER = "Give a folder and a model that belong together, or save the model again."
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        SavedModelError: When it is missing, truncated, or no safetensors file.
    """
    with _reading(path):
        return load_file(path)


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: their shapes and dtypes, at no cost.

    Raises:
        SavedModelError: As `read_weights`.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        odd = {name: one.get_dtype() for name, one in slices.items() if one.get_dtype() not in _DTYPES}
        if odd:
            raise SavedModelError(f"{path} holds {next(iter(odd.items()))}, no dtype that networks run in.")
        return {
            name: torch.empty(one.get_shape(), dtype=_DTYPES[one.get_dtype()], device="meta")
            for name, one in slices.items()
        }


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise SavedModelError(f"{path} is missing; the folder is incomplete. Save or copy it again.")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise SavedModelError(f"{path} is broken: {last_line(error)}. Save or copy it again.") from error


def load_weights_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors into a model that must have all of them and no others, in their dtypes.

    Raises:
        SavedModelError: When names or shapes differ, with the first that does.
    """
    check_fits(model, state)
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # with the buffers that no state holds
    own = model.state_dict(keep_vars=True)
    for name, value in state.items():
        own[name].data = own[name].data.to(value.dtype)
    versioned = OrderedDict(state)
    vars(versioned)["_metadata"] = vars(own)["_metadata"]  # some modules refuse a state without their version
    model.load_state_dict(versioned, strict=False)


def check_fits(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Hold tensors, or their shapes on the meta device, against a model that must have all of them and no others.

    Raises:
        SavedModelError: When names, shapes or kinds of dtypes differ, with the first that does.
    """
    own = model.state_dict(keep_vars=True)
    # A tensor with several names is stored under one of them.
    stored = {id(own[name]) for name in own.keys() & state.keys()}
    missing = [name for name, value in own.items() if name not in state and id(value) not in stored]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        raise SavedModelError(
            f"the weights are not those of this {type(model).__name__}: {len(missing)} tensors are missing and "
            f"{len(unknown)} are unknown, {[*missing, *unknown][0]!r} first. {_TOGETHER}"
        )
    for name, value in state.items():
        if value.shape != own[name].shape or _kind(value) != _kind(own[name]):
            raise SavedModelError(
                f"the weights are not those of this {type(model).__name__}: {name!r} is {_described(value)} "
                f"where the model has {_described(own[name])}. {_TOGETHER}"
            )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def has_channels_last(model: nn.Module) -> bool:
    """Whether a weight of the model lies channels-last in memory."""
    return any(map(is_channels_last, model.parameters()))


def to_channels_last_(model: nn.Module) -> None:
    """Put the weights into the memory format of images with their channels last."""
    for weight in model.parameters():
        if weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim])
