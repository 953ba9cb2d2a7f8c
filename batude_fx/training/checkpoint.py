"""Everything a killed run needs to go on, in one safetensors file: tensors as such, all else as JSON beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from batude_fx.errors import TrainingError
from batude_fx.support.atomic_files import atomic_file


def write(path: Path, tree: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers, texts and None; a reader sees the old file or the new one.

    Keys of dicts are texts, or integers as in the state of torch's optimizers.
    """
    tensors: dict[str, Tensor] = {}

    def packed(value: Any) -> Any:  # noqa: ANN401 - a leaf or a branch
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"pairs": [[key, packed(item)] for key, item in value.items()]}
        return [packed(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(packed(tree))
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"tree": text})


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; tuples come back as lists.

    Raises:
        TrainingError: When the file is missing or broken.
    """
    if not path.is_file():
        raise TrainingError(f"{path} does not exist, so there is nothing to go on from; start without --resume.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            text = (file.metadata() or {})["tree"]
        unpacked: dict[str, Any] = _unpacked(json.loads(text), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} is broken ({error}); start again without --resume.") from error
    return unpacked


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - a leaf or a branch
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[str(value["tensor"])]
    return {key: _unpacked(item, tensors) for key, item in value["pairs"]}
