"""What all phases of a run share: the machine, the images, the folder, and what is known so far."""

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
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
from batude_fx.training import checkpoint
from batude_fx.training.data import Data
from batude_fx.training.duration import Duration
from batude_fx.training.recipe import Recipe

CHECKPOINT, ORIGINAL, RECIPE, LOG, RESULT, PICTURE = (
    "checkpoint.safetensors", "original.safetensors", "recipe.yaml", "log.jsonl", "result.json", "ranks.png",
)  # fmt: skip
PHASES = ("pretrain", "one_shot", "finalize")
_LIBRARIES = ("batude-fx", "torch", "timm", "torchvision", "accelerate")  # whose versions result.json names


class Session:
    """One run, in a folder or in memory alone.

    Args:
        recipe: What to do.
        folder: Where everything is written; None writes nothing.
        resume: Whether to go on from the folder's checkpoint.

    Raises:
        TrainingError: The folder holds something else, or nothing to go on from.

    Attributes:
        accelerator: Devices, precision, processes.
        data: The images; set by `start`, once the network is known.
        classes: Their number.
        rounds: One record per round of BC-ADL.
        log: All records, evaluations among them.
        kept: What was computed once.
        resumed: The checkpoint that the run goes on from; empty for a new run.
    """

    data: Data
    classes: int

    def __init__(self, recipe: Recipe, folder: Path | None, *, resume: bool) -> None:
        self.recipe, self.folder = recipe, folder
        self.kept: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.resumed: dict[str, Any] = {}
        self.accelerator = _accelerator(recipe, folder)
        # All look before one writes.
        if resume:
            self._go_on()
        elif folder is not None:
            _check_new(folder)
        self.accelerator.wait_for_everyone()

    def start(self, data: Data) -> None:
        """Make the folder, now that there is something to train on: a run that cannot begin leaves nothing behind."""
        self.data = data
        if self._writes:
            place = cast("Path", self.folder)
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TrainingError(f"{place} cannot be written: {error.strerror}. Choose another place.") from error
            with atomic_file(place / RECIPE) as text:
                text.write_text(self.recipe.to_yaml(), encoding="utf-8")
            if self.accelerator.log_with:
                self.accelerator.init_trackers("tensorboard")

    @property
    def _writes(self) -> bool:
        return self.folder is not None and self.accelerator.is_main_process

    def _go_on(self) -> None:
        if self.folder is None:
            raise TrainingError("resume needs the folder of the run to go on with.")
        path = self.folder / RECIPE
        if not path.is_file():
            raise TrainingError(f"{self.folder} holds no run to go on with; start without --resume.")
        if path.read_text(encoding="utf-8") != self.recipe.to_yaml():
            raise TrainingError(
                f"{path} is another recipe than the one to go on with: {self._first_difference(path)}. Give the same "
                "settings, or a new folder."
            )
        if (self.folder / RESULT).is_file():
            raise TrainingError(f"the run in {self.folder} is finished; see {RESULT} there, or give a new folder.")
        if not (self.folder / CHECKPOINT).is_file():
            return  # killed before the first one
        self.resumed = checkpoint.read(self.folder / CHECKPOINT)
        self.kept, self.rounds, self.log = (self.resumed[name] for name in ("kept", "rounds", "log"))

    def _first_difference(self, path: Path) -> str:
        lines = zip(path.read_text(encoding="utf-8").splitlines(), self.recipe.to_yaml().splitlines(), strict=False)
        there, here = next((pair for pair in lines if pair[0] != pair[1]), ("more lines", "fewer"))
        return f"there {there.strip()!r}, here {here.strip()!r}"

    @property
    def per_epoch(self) -> int:
        """Optimizer steps."""
        return self.data.batches // self.recipe.data.accumulate

    def is_due(self, interval: Duration, steps: int) -> bool:
        """Whether something that is done at an interval is to be done after so many steps."""
        return steps % max(1, interval.steps(self.per_epoch)) == 0

    def placed(self, images: Tensor) -> Tensor:
        """Images on the device, in the memory format of the recipe."""
        last = images.ndim == 4 and self.recipe.model.channels_last  # noqa: PLR2004 - (n, C, H, W)
        return images.to(self.accelerator.device, memory_format=torch.channels_last if last else torch.preserve_format)

    def share_buffers_(self, model: nn.Module) -> None:
        """Give all processes the batch-norm statistics of the first, which are those that are saved."""
        for buffer in model.buffers():
            broadcast(buffer)

    def begins(self, phase: str) -> bool:
        """Whether a phase is still to be done, or to be gone on with."""
        return not self.resumed or PHASES.index(phase) >= PHASES.index(self.resumed["phase"])

    def is_inside(self, phase: str) -> bool:
        """Whether the run goes on inside this phase."""
        return bool(self.resumed) and self.resumed["phase"] == phase

    def keep_original(self, model: nn.Module) -> None:
        """Keep the weights that one-shot training starts from, or put them back into the model."""
        if self.folder is None:
            return
        path = self.folder / ORIGINAL
        if self.resumed and not self.is_inside("pretrain"):
            load_weights_(model, read_weights(path))
        elif self._writes:
            with atomic_file(path) as weights:
                save_model(model, str(weights))

    def once(self, name: str, compute: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever is computed
        """A result that is computed once, however often the run is killed."""
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]

    def note(self, record: dict[str, Any]) -> None:
        """A line of the log; its numbers go to the trackers too."""
        self.log.append(record)
        if self._writes:
            with atomic_file(cast("Path", self.folder) / LOG) as text:
                text.write_text("".join(json.dumps(line) + "\n" for line in self.log), encoding="utf-8")
        numbers = {f"{record['phase']}/{name}": one for name, one in record.items() if isinstance(one, float | int)}
        self.accelerator.log(numbers, step=record["step"])

    def write(self, phase: str, step: int, parts: Mapping[str, Any]) -> None:
        """A checkpoint: `step` steps of the phase are done."""
        if self._writes:
            state = {name: part.state_dict() for name, part in parts.items()}
            shared = {"kept": self.kept, "rounds": self.rounds, "log": self.log}
            path = cast("Path", self.folder) / CHECKPOINT
            checkpoint.write(path, {"phase": phase, "step": step, "parts": state, **shared})
        self.accelerator.wait_for_everyone()

    def restored(self, phase: str, parts: Mapping[str, Any]) -> int:
        """Put a checkpoint's state in its places; how many steps of this phase are done."""
        if not self.is_inside(phase):
            return 0
        for name, part in parts.items():
            part.load_state_dict(self.resumed["parts"][name])
        return int(self.resumed["step"])

    def finish(self, model: nn.Module, facts: dict[str, Any]) -> None:
        """Save the network, its report and pictures, and drop the checkpoint."""
        self.accelerator.end_training()
        if not self._writes:
            return
        from batude_fx.report.figures import pictures, write_png

        folder = cast("Path", self.folder)
        shutil.rmtree(folder / TRAINED_NETWORK, ignore_errors=True)  # what a run that was killed here has left
        save(model, folder / TRAINED_NETWORK)
        write_png(pictures(cast("Record", attached_record(model)))["ranks"], folder / PICTURE)
        machine = {
            "device": str(self.accelerator.device), "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        versions = {name: version(name) for name in _LIBRARIES}
        facts = {**facts, "seed": self.recipe.seed, "machine": machine, "versions": versions, "log": self.log}
        with atomic_file(folder / RESULT) as text:
            text.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (folder / CHECKPOINT).unlink(missing_ok=True)


def _accelerator(recipe: Recipe, folder: Path | None) -> Accelerator:
    AcceleratorState._reset_state()  # noqa: SLF001 - it would refuse a second run of another precision
    tracked = folder is not None and find_spec("tensorboard") is not None
    try:
        accelerator = Accelerator(
            mixed_precision="no" if recipe.model.precision == "fp32" else recipe.model.precision,
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, use_seedable_sampler=True, data_seed=recipe.seed
            ),
            log_with="tensorboard" if tracked else None,
            project_dir=folder if tracked else None,
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # no such precision on this machine
        raise recipe.problem("model.precision", f"{error}; use fp32") from None
    accelerator.gradient_accumulation_steps = 1  # `data.accumulate` says; the environment may say otherwise
    return accelerator


def _check_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; give a folder.")
    if (folder / RECIPE).exists():
        ended = "is finished" if (folder / RESULT).exists() else "can be gone on with by --resume"
        raise TrainingError(f"{folder} holds a run already, which {ended}; give a new folder for another.")
    if visible_entries(folder):
        raise TrainingError(f"{folder} holds other files; give a new folder.")
