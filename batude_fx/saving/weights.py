"""Weights of saved networks: read from `model.safetensors`, checked against a model, and loaded into it."""

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

_WAY_OUT = "Give a folder and a model that belong together, or save the model again."
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
    """Read the tensors of a safetensors file.

    Raises:
        SavedModelError: When the file is missing, is truncated, or is not a safetensors file.
    """
    with _reading(path):
        return load_file(path)


def read_shapes(path: Path) -> dict[str, Tensor]:
    """Read the shapes and dtypes of a safetensors file as tensors on the meta device, without reading the values.

    Raises:
        SavedModelError: When the file is missing, is truncated, or is not a safetensors file of common dtypes.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
        dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
        if foreign := [(name, dtype) for name, dtype in dtypes.items() if dtype not in _DTYPES]:
            raise SavedModelError(f"{path} holds {foreign[0]}, no dtype that networks run in.")
        return {
            name: torch.empty(tensor.get_shape(), dtype=_DTYPES[dtypes[name]], device="meta")
            for name, tensor in slices.items()
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
    """Load tensors into a model that must have exactly these; parameters and buffers get the dtypes of the tensors.

    Raises:
        SavedModelError: When names, shapes or kinds of dtypes differ; the message names the first tensor that does.
    """
    check_fits(model, state)
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # buffers that are not in the state dict too
    own = model.state_dict(keep_vars=True)
    for name, value in state.items():
        own[name].data = own[name].data.to(value.dtype)
    versioned = OrderedDict(state)
    vars(versioned)["_metadata"] = vars(own)["_metadata"]  # some modules refuse a state dict without version numbers
    model.load_state_dict(versioned, strict=False)


def check_fits(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors, which may be on the meta device, that are not exactly those of a model.

    Raises:
        SavedModelError: When names, shapes or kinds of dtypes differ; the message names the first tensor that does.
    """
    own = model.state_dict(keep_vars=True)
    # A tensor with several names is stored under one of them.
    stored_ids = {id(own[name]) for name in own.keys() & state.keys()}
    missing = [name for name, value in own.items() if name not in state and id(value) not in stored_ids]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        raise SavedModelError(
            f"the weights are not those of this {type(model).__name__}: {len(missing)} tensors are missing and "
            f"{len(unknown)} are unknown, {[*missing, *unknown][0]!r} first. {_WAY_OUT}"
        )
    for name, value in state.items():
        if value.shape != own[name].shape or _kind(value) != _kind(own[name]):
            raise SavedModelError(
                f"the weights are not those of this {type(model).__name__}: {name!r} is {_describe(value)} "
                f"where the model has {_describe(own[name])}. {_WAY_OUT}"
            )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """Return whether a dtype is floating-point, complex or neither: within a kind, dtypes can be converted."""
    return tensor.is_floating_point(), tensor.is_complex()


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def has_channels_last(model: nn.Module) -> bool:
    """Return whether a parameter of a model is channels-last in memory."""
    return any(map(is_channels_last, model.parameters()))


def to_channels_last_(model: nn.Module) -> None:
    """Convert the weights of a model to channels-last memory format, in place."""
    for weight in model.parameters():
        if weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim])
