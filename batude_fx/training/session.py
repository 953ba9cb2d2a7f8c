"""The state that all phases of a run share: devices, images, the folder, the log and the last checkpoint."""

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from safetensors.torch import save_model
from torch import Tensor, nn

from batude_fx.errors import TrainingError
from batude_fx.graph.provenance import attached_record
from batude_fx.report.record import Record
from batude_fx.saving.config import TRAINED_NETWORK
from batude_fx.saving.saved_folder import save
from batude_fx.saving.weights import load_weights_, read_weights
from batude_fx.support.atomic_files import atomic_file, visible_entries
from batude_fx.support.versions import library_versions
from batude_fx.training import checkpoint_file
from batude_fx.training.data import Data
from batude_fx.training.duration import Duration
from batude_fx.training.recipe import Recipe

CHECKPOINT, ORIGINAL, RECIPE, LOG, RESULT, PICTURE = (
    "checkpoint.safetensors", "original.safetensors", "recipe.yaml", "log.jsonl", "result.json", "ranks.png",
)  # fmt: skip
PHASES = ("pretrain", "one_shot", "finalize")
_LIBRARIES = ("batude-fx", "torch", "timm", "torchvision", "accelerate")  # whose versions result.json names


class Session:
    """One run of a recipe, in a folder or in memory only.

    Args:
        recipe: The recipe.
        folder: The folder that everything is written to; None writes nothing.
        resume: Whether to continue from the folder's checkpoint.

    Raises:
        TrainingError: When the folder holds something else, or nothing to resume.

    Attributes:
        accelerator: Devices, precision and processes.
        data: The images; set by `start`, once the network is known.
        classes: Number of classes.
        rounds: One record per round of BC-ADL.
        log: All records: evaluations and rounds.
        results: Results that a resumed run must not compute again, by name.
        resumed: The checkpoint from which the run continues; empty for a new run.
    """

    data: Data
    classes: int

    def __init__(self, recipe: Recipe, folder: Path | None, *, resume: bool) -> None:
        self.recipe, self.folder = recipe, folder
        self.results: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.resumed: dict[str, Any] = {}
        self.accelerator = _accelerator(recipe, folder)
        # Every process checks the folder before the main process writes to it.
        if resume:
            self._resume()
        elif folder is not None:
            _check_new(folder)
        self.accelerator.wait_for_everyone()

    def start(self, data: Data) -> None:
        """Create the folder. It is not created earlier, so that a run without images leaves nothing behind."""
        self.data = data
        if self._writes:
            folder = cast("Path", self.folder)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TrainingError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error
            with atomic_file(folder / RECIPE) as file:
                file.write_text(self.recipe.to_yaml(), encoding="utf-8")
            if self.accelerator.log_with:
                self.accelerator.init_trackers("tensorboard")

    @property
    def _writes(self) -> bool:
        return self.folder is not None and self.accelerator.is_main_process

    def _resume(self) -> None:
        if self.folder is None:
            raise TrainingError("resume=True needs the folder of the run to resume.")
        path = self.folder / RECIPE
        if not path.is_file():
            raise TrainingError(f"{self.folder} holds no run to resume; start without --resume.")
        if path.read_text(encoding="utf-8") != self.recipe.to_yaml():
            raise TrainingError(
                f"{path} differs from the recipe of this run: {self._first_difference(path)}. Give the same settings, "
                "or a new folder."
            )
        if (self.folder / RESULT).is_file():
            raise TrainingError(f"the run in {self.folder} is finished; see {RESULT} there, or give a new folder.")
        if not (self.folder / CHECKPOINT).is_file():
            return  # it was interrupted before its first checkpoint
        self.resumed = checkpoint_file.read(self.folder / CHECKPOINT)
        self.results, self.rounds, self.log = (self.resumed[name] for name in ("kept", "rounds", "log"))

    def _first_difference(self, path: Path) -> str:
        lines = zip(path.read_text(encoding="utf-8").splitlines(), self.recipe.to_yaml().splitlines(), strict=False)
        there, here = next((pair for pair in lines if pair[0] != pair[1]), ("more lines", "fewer"))
        return f"there {there.strip()!r}, here {here.strip()!r}"

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps in an epoch."""
        return self.data.batches // self.recipe.data.accumulate

    def is_due(self, interval: Duration, step_count: int) -> bool:
        """Return whether something that is done once per interval is due after so many steps."""
        return step_count % max(1, interval.steps(self.steps_per_epoch)) == 0

    def to_device(self, images: Tensor) -> Tensor:
        """Return images on the device, in the memory format of the recipe."""
        channels_last = images.ndim == 4 and self.recipe.model.channels_last  # noqa: PLR2004 - (n, C, H, W)
        memory_format = torch.channels_last if channels_last else torch.preserve_format
        return images.to(self.accelerator.device, memory_format=memory_format)

    def share_buffers_(self, model: nn.Module) -> None:
        """Give all processes the batch-norm statistics of the first process, which are the ones that are saved."""
        for buffer in model.buffers():
            broadcast(buffer)

    def is_pending(self, phase: str) -> bool:
        """Return whether a phase is not finished yet."""
        return not self.resumed or PHASES.index(phase) >= PHASES.index(self.resumed["phase"])

    def resumes_inside(self, phase: str) -> bool:
        """Return whether the checkpoint of a resumed run was written in this phase."""
        return bool(self.resumed) and self.resumed["phase"] == phase

    def save_or_restore_original_(self, model: nn.Module) -> None:
        """Save the weights that one-shot training starts from, or load them if the run resumes after that point."""
        if self.folder is None:
            return
        path = self.folder / ORIGINAL
        if self.resumed and not self.resumes_inside("pretrain"):
            load_weights_(model, read_weights(path))
        elif self._writes:
            with atomic_file(path) as file:
                save_model(model, str(file))

    def compute_once(self, name: str, compute: Callable[[], Any]) -> Any:  # noqa: ANN401 - the type of the result
        """Return the result of `compute`, which a resumed run takes from its checkpoint."""
        if name not in self.results:
            self.results[name] = compute()
        return self.results[name]

    def add_to_log(self, record: dict[str, Any]) -> None:
        """Append a record to the log, and send its numbers to TensorBoard."""
        self.log.append(record)
        if self._writes:
            with atomic_file(cast("Path", self.folder) / LOG) as file:
                file.write_text("".join(json.dumps(line) + "\n" for line in self.log), encoding="utf-8")
        phase = record["phase"]
        numbers = {f"{phase}/{name}": value for name, value in record.items() if isinstance(value, float | int)}
        self.accelerator.log(numbers, step=record["step"])

    def write_checkpoint(self, phase: str, step_count: int, parts: Mapping[str, Any]) -> None:
        """Write the state of all parts after `step_count` steps of a phase."""
        if self._writes:
            states = {name: part.state_dict() for name, part in parts.items()}
            # The keys are those of earlier checkpoints.
            shared = {"kept": self.results, "rounds": self.rounds, "log": self.log}
            path = cast("Path", self.folder) / CHECKPOINT
            checkpoint_file.write(path, {"phase": phase, "step": step_count, "parts": states, **shared})
        self.accelerator.wait_for_everyone()

    def restore_checkpoint_(self, phase: str, parts: Mapping[str, Any]) -> int:
        """Load the state of all parts if the run resumes inside this phase; return the number of steps it has done."""
        if not self.resumes_inside(phase):
            return 0
        for name, part in parts.items():
            part.load_state_dict(self.resumed["parts"][name])
        return int(self.resumed["step"])

    def finish(self, model: nn.Module, facts: dict[str, Any]) -> None:
        """Save the network, its report, a picture of the ranks and the result, and delete the checkpoint."""
        self.accelerator.end_training()
        if not self._writes:
            return
        from batude_fx.report.figures import pictures, write_png

        folder = cast("Path", self.folder)
        shutil.rmtree(folder / TRAINED_NETWORK, ignore_errors=True)  # left by a run that was killed at this point
        save(model, folder / TRAINED_NETWORK)
        write_png(pictures(cast("Record", attached_record(model)))["ranks"], folder / PICTURE)
        machine = {
            "device": str(self.accelerator.device), "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(), **library_versions("python"),
        }  # fmt: skip
        versions = library_versions(*_LIBRARIES)
        facts = {**facts, "seed": self.recipe.seed, "machine": machine, "versions": versions, "log": self.log}
        with atomic_file(folder / RESULT) as file:
            file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (folder / CHECKPOINT).unlink(missing_ok=True)


def _accelerator(recipe: Recipe, folder: Path | None) -> Accelerator:
    AcceleratorState._reset_state()  # noqa: SLF001 - accelerate refuses a second run with another precision
    has_tracker = folder is not None and find_spec("tensorboard") is not None
    try:
        accelerator = Accelerator(
            mixed_precision="no" if recipe.model.precision == "fp32" else recipe.model.precision,
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, use_seedable_sampler=True, data_seed=recipe.seed
            ),
            log_with="tensorboard" if has_tracker else None,
            project_dir=folder if has_tracker else None,
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # no such precision on this machine
        raise recipe.problem("model.precision", f"{error}; use fp32") from None
    accelerator.gradient_accumulation_steps = 1  # `data.accumulate` decides, not an environment variable
    return accelerator


def _check_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; give a folder.")
    if (folder / RECIPE).exists():
        state = "is finished" if (folder / RESULT).exists() else "can be resumed with --resume"
        raise TrainingError(f"{folder} holds a run already, which {state}; give a new folder for another.")
    if visible_entries(folder):
        raise TrainingError(f"{folder} holds other files; give a new folder.")
