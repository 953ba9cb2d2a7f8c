"""The file format of checkpoints: nested state in one safetensors file, whose metadata holds all else than tensors.

What a checkpoint holds is put together in `session.Session.write_checkpoint`: phase, step, log, rounds and results, and
under "parts" the states of what `phase._Trainer` lists: model, optimizer, moving average, and the Lagrangian of BC-ADL.
A checksum over all of it shows damage: a single wrong bit in a weight would otherwise lead to another network.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from batude_fx.errors import TrainingError, last_line
from batude_fx.report.record import RankPair, RoundRecord, Share
from batude_fx.support.atomic_files import atomic_file
from batude_fx.support.validation import first_mistake

Phase = Literal["pretrain", "one_shot", "finalize"]
ORIGINAL = "original.safetensors"
"""Name of the file with the weights that one-shot training starts from."""
Kept = TypedDict(
    "Kept", {"original.safetensors": str, "original_accuracy": Share, "ranks": dict[str, RankPair | None]}, total=False
)
Kept.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


def _check_round(entry: dict[str, Any]) -> dict[str, Any]:
    """Refuse a round that the report of the finished run could not show."""
    RoundRecord.model_validate(entry)
    return entry


class Checkpoint(BaseModel):
    """What a run needs in order to go on.

    Attributes:
        phase: The phase of training that it was written in.
        step: Number of steps of this phase that are done.
        parts: States of the network, the optimizer and others, as their `state_dict` returns them.
        kept: Results that are not computed again, by name: the checksum of the file with the original's weights, its
            accuracy, and the ranks that one-shot training has found.
        rounds: One record per round of BC-ADL.
        log: All records: evaluations and rounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    phase: Phase
    step: Annotated[int, Field(ge=0)]
    parts: dict[str, Any]
    kept: Kept
    rounds: list[Annotated[dict[str, Any], AfterValidator(_check_round)]]
    log: list[dict[str, str | int | float | None]]

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.phase == "finalize" and "ranks" not in self.kept:
            raise ValueError("it lacks the ranks that are finalized")
        return self


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint.

    The file is replaced as a whole, so that a run killed meanwhile leaves the previous checkpoint. Its parts are nested
    dicts and lists of tensors, numbers, strings, booleans and None. Keys of dicts are strings, or integers as in the
    state of torch's optimizers.

    Raises:
        TrainingError: When the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:  # noqa: ANN401 - a leaf or a branch
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):  # pairs, as keys in JSON are strings only
            return {"pairs": [[key, pack(item)] for key, item in value.items()]}
        return [pack(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(pack(dict(checkpoint)))
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {"tree": text, "checksum": _checksum(text, tensors)})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be written: {last_line(error)}. The checkpoint before it stays.") from error


def read(path: Path) -> Checkpoint:
    """Return what `write` wrote; tuples become lists.

    Raises:
        TrainingError: When the file is missing or broken, or was written by a batude_fx without checksums.
    """
    if not path.is_file():
        raise TrainingError(f"{path} does not exist, so there is nothing to resume; start without --resume.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
        if "tree" in metadata and "checksum" not in metadata:
            raise _of_older_version(path)
        if metadata["checksum"] != _checksum(metadata["tree"], tensors):
            raise ValueError("its checksum is wrong")  # noqa: TRY301 - damage of all kinds has one message
        return Checkpoint.model_validate(_unpack(json.loads(metadata["tree"]), tensors))
    except ValidationError as error:
        reason = str(first_mistake(error))
    except KeyError as error:
        reason = f"it lacks {error}"
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        reason = last_line(error)
    raise TrainingError(f"{path} is broken: {reason.rstrip('.')}. Start again in a new folder, without --resume.")


def _of_older_version(path: Path) -> TrainingError:
    return TrainingError(
        f"{path} was written by an older batude_fx, without the checksum that this one needs. Resume the run with that "
        "version, or start again in a new folder, without --resume."
    )


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the tree, and of the dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - a leaf or a branch
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[str(value["tensor"])]
    return {key: _unpack(item, tensors) for key, item in value["pairs"]}
