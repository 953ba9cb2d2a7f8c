"""The file format of checkpoints: nested state in one safetensors file, whose metadata holds all else than tensors.

What a checkpoint holds is put together in `session.Session.write_checkpoint`: phase, step, log, rounds and results, and
under "parts" the states of what `phase._Trainer` lists: model, optimizer, moving average, and the Lagrangian of BC-ADL.
"""

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
    """Write nested dicts and lists of tensors, numbers, strings, booleans and None.

    The file is replaced as a whole, so that a run killed meanwhile leaves the previous checkpoint. Keys of dicts are
    strings, or integers as in the state of torch's optimizers.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:  # noqa: ANN401 - a leaf or a branch
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):  # pairs, as keys in JSON are strings only
            return {"pairs": [[key, pack(item)] for key, item in value.items()]}
        return [pack(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(pack(tree))
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"tree": text})


def read(path: Path) -> dict[str, Any]:
    """Return what `write` wrote; tuples become lists.

    Raises:
        TrainingError: When the file is missing or broken.
    """
    if not path.is_file():
        raise TrainingError(f"{path} does not exist, so there is nothing to resume; start without --resume.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            text = (file.metadata() or {})["tree"]
        tree: dict[str, Any] = _unpack(json.loads(text), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} is broken ({error}); start again without --resume.") from error
    return tree


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - a leaf or a branch
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[str(value["tensor"])]
    return {key: _unpack(item, tensors) for key, item in value["pairs"]}
