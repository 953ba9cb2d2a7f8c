"""The state that all phases of a run share: devices, images, the folder, the log and the last checkpoint."""

import hashlib
import json
import re
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, cast, get_args

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast
from safetensors.torch import save_model
from torch import Tensor, nn

from batude_fx.errors import SavedModelError, TrainingError, last_line
from batude_fx.graph.provenance import attached_record
from batude_fx.quality.comparison import QualityMeter
from batude_fx.report.record import Record
from batude_fx.saving.config import TRAINED_NETWORK
from batude_fx.saving.saved_folder import save
from batude_fx.saving.weights import load_weights_, read_weights
from batude_fx.support.atomic_files import atomic_file, check_writable, lock_folder, visible_entries, write_text
from batude_fx.support.progress import print_line
from batude_fx.support.versions import library_versions
from batude_fx.training import checkpoint_file
from batude_fx.training.checkpoint_file import ORIGINAL, Checkpoint, Kept, Phase
from batude_fx.training.data import Data
from batude_fx.training.duration import Duration
from batude_fx.training.interruption import Interruption
from batude_fx.training.recipe import Recipe

CHECKPOINT, RECIPE, LOG, RESULT, PICTURE = (
    "checkpoint.safetensors", "recipe.yaml", "log.jsonl", "result.json", "ranks.png",
)  # fmt: skip
PHASES: tuple[Phase, ...] = get_args(Phase)
_STEPS_UNASKED = 20  # between two questions to all processes whether one was interrupted
_LIBRARIES = ("batude-fx", "torch", "timm", "torchvision", "accelerate")  # whose versions result.json names


class Session:
    """One run of a recipe, in a folder or in memory only; used as a context, which holds the folder's lock.

    Args:
        recipe: The recipe.
        folder: The folder that everything is written to; None writes nothing.
        resume: Whether to continue from the folder's checkpoint.
        restores: Whether it restores a network for `compress`: then only a progress bar is shown, and Ctrl-C or a loss
            that is not finite end it with the closest network, where a run would raise an error.

    Raises:
        TrainingError: When the folder holds something else, nothing to resume, or a run of another process.

    Attributes:
        accelerator: Devices, precision and processes.
        data: The images; set by `start`, once the network is known.
        classes: Number of classes.
        meter: What measures how close networks are to the original; set by the caller where there are no labels.
        rounds: One record per round of BC-ADL.
        log: All records: evaluations and rounds.
        results: Results that a resumed run must not compute again, by name.
        resumed: The checkpoint from which the run continues; None for a new run.
        interruption: Whether the run was asked to stop.
    """

    data: Data
    classes: int = 0
    meter: QualityMeter

    def __init__(self, recipe: Recipe, folder: Path | None, *, resume: bool, restores: bool = False) -> None:
        self.recipe, self.folder, self.restores = recipe, folder, restores
        self.results: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.resumed: Checkpoint | None = None
        self.interruption = Interruption((signal.SIGINT,)) if restores else Interruption()
        self._resumes = resume
        with ExitStack() as stack:
            stack.enter_context(own_accelerate_state())
            self.accelerator = _accelerator(recipe, folder)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        """Check the folder, lock it if its run is resumed, and note signals from now on."""
        with self._stack as stack:  # closed where the folder is refused
            stack.enter_context(self.interruption.noted())
            # Every process checks the folder before the main process writes to it.
            if self._resumes:
                self._resume()
            elif self.folder is not None:
                _check_new(self.folder)
            self.accelerator.wait_for_everyone()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Unlock the folder, and leave signals to others."""
        self._stack.close()

    def start(self, data: Data) -> None:
        """Create the folder. It is not created earlier, so that a run without images leaves nothing behind."""
        self.data = data
        if self._writes:
            folder = cast("Path", self.folder)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not self._resumes:
                    self._lock()
                    _check_new(folder)  # another process may have been quicker
                write_text(folder / RECIPE, self.recipe.to_yaml())
            except OSError as error:
                raise _cannot_write(folder, error) from error
            if self._resumes:
                print_line(self._resumed_from())
            if self.accelerator.log_with:
                self.accelerator.init_trackers("tensorboard")

    def _resumed_from(self) -> str:
        if self.resumed is None:
            return f"{self.folder} has no checkpoint yet, so the run begins anew"
        return f"resuming after step {self.resumed.step} of {self.resumed.phase}"

    def _lock(self) -> None:
        """Refuse a folder in which another process trains."""
        if self._writes:
            try:
                self._stack.enter_context(lock_folder(cast("Path", self.folder)))
            except BlockingIOError as error:
                raise TrainingError(
                    f"{self.folder} is in use: {error} trains in it. Wait until it ends, or give another folder."
                ) from None

    @property
    def _writes(self) -> bool:
        return self.folder is not None and self.accelerator.is_main_process

    def _resume(self) -> None:
        if self.folder is None:
            raise TrainingError("resume=True needs the folder of the run to resume.")
        path = self.folder / RECIPE
        if not path.is_file():
            raise TrainingError(f"{self.folder} holds no run to resume; start without --resume.")
        try:
            check_writable(self.folder)
            self._lock()
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        if path.read_bytes() != self.recipe.to_yaml().encode():
            raise TrainingError(
                f"{path} differs from the recipe of this run: {self._first_difference(path)}. Give the same settings, "
                "or a new folder."
            )
        if (self.folder / RESULT).is_file():
            (self.folder / CHECKPOINT).unlink(missing_ok=True)  # the run may have been killed before it did that
            raise TrainingError(f"the run in {self.folder} is finished; see {RESULT} there, or give a new folder.")
        if not (self.folder / CHECKPOINT).is_file():
            return  # it was interrupted before its first checkpoint
        self.resumed = checkpoint_file.read(self.folder / CHECKPOINT)
        self.results, self.rounds, self.log = dict(self.resumed.kept), self.resumed.rounds, self.resumed.log

    def _first_difference(self, path: Path) -> str:
        written = path.read_text(encoding="utf-8", errors="backslashreplace")
        lines = zip(written.splitlines(), self.recipe.to_yaml().splitlines(), strict=False)
        there, here = next((pair for pair in lines if pair[0] != pair[1]), ("more lines", "fewer"))
        return f"there {there.strip()!r}, here {here.strip()!r}"

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps in an epoch."""
        return self.data.batches // self.recipe.data.accumulate

    def is_due(self, interval: Duration, step_count: int) -> bool:
        """Return whether something that is done once per interval is due after so many steps."""
        return step_count % max(1, interval.steps(self.steps_per_epoch)) == 0

    def is_interrupted(self, step: int) -> bool:
        """Return whether any of the processes was asked to stop before a step; all of them get the same answer.

        Several processes ask each other only now and then, as each time they wait for each other.
        """
        received = self.interruption.received
        if self.accelerator.num_processes == 1:
            return received
        if step % _STEPS_UNASKED:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(received), device=self.accelerator.device)) > 0)

    def to_device(self, images: Tensor) -> Tensor:
        """Return images on the device, in the memory format of the recipe."""
        channels_last = images.ndim == 4 and self.recipe.model.channels_last  # noqa: PLR2004 - (n, C, H, W)
        memory_format = torch.channels_last if channels_last else torch.preserve_format
        return images.to(self.accelerator.device, memory_format=memory_format)

    def share_buffers_(self, model: nn.Module) -> None:
        """Give all processes the batch-norm statistics of the first process, which are the ones that are saved."""
        for buffer in model.buffers():
            broadcast(buffer)

    def is_pending(self, phase: Phase) -> bool:
        """Return whether a phase is not finished yet."""
        return not self.resumed or PHASES.index(phase) >= PHASES.index(self.resumed.phase)

    def resumes_inside(self, phase: Phase) -> bool:
        """Return whether the checkpoint of a resumed run was written in this phase."""
        return self.resumed is not None and self.resumed.phase == phase

    def save_or_restore_original_(self, model: nn.Module) -> None:
        """Save the weights that one-shot training starts from, or load them if the run resumes after that point."""
        if self.folder is None:
            return
        path = self.folder / ORIGINAL
        if self.resumed and not self.resumes_inside("pretrain"):
            if path.is_file() and self.results.get(ORIGINAL) != _checksum(path):
                raise TrainingError(f"{path} is broken: its checksum is wrong. Start again in a new folder.")
            load_weights_(model, read_weights(path))
        elif self._writes:
            with self.explaining(lambda: f"writing {path}"), atomic_file(path) as file:
                save_model(model, str(file))
            self.results[ORIGINAL] = _checksum(path)

    def compute_once(self, name: str, compute: Callable[[], Any]) -> Any:  # noqa: ANN401 - the type of the result
        """Return the result of `compute`, which a resumed run takes from its checkpoint."""
        if name not in self.results:
            self.results[name] = compute()
        return self.results[name]

    @contextmanager
    def explaining(self, place: Callable[[], str]) -> Iterator[None]:
        """Turn whatever a block raises, in the images, the network or its hooks, into an error that says what to do.

        Args:
            place: Returns the part of the run that failed, as the message names it.

        Raises:
            TrainingError: In place of any other error.
        """
        try:
            yield
        except TrainingError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {_reason(error)}"
            raise TrainingError(f"{place()} failed: {reason}. {self._way_out()}.") from error

    def _way_out(self) -> str:
        """What a message tells the user to do where the cause may lie in the recipe or outside of it."""
        if self.restores:
            return "Mend the cause, or leave out restore"
        if self.folder is None or not (self.folder / CHECKPOINT).is_file():
            place = "" if self.folder is None else " in a new folder"
            return f"Mend the cause, or change the recipe, and begin again{place}"
        return (
            f"If the cause is outside of the recipe, mend it and {self.way_to_resume}. Otherwise change the recipe and "
            "give a new folder"
        )

    def way_to_converge(self, phase: Phase, rate: float) -> str:
        """What a message tells the user to do where the loss or the weights are no longer finite."""
        others = [f"clip the gradient by {phase}.clip_grad=1", "look for NaN in the images and in the weights"]
        if self.recipe.model.precision != "fp32":
            others.insert(0, f"set model.precision=fp32, now {self.recipe.model.precision}")
        return f"Lower {phase}.lr, now {rate:g}, {', '.join(others[:-1])}, or {others[-1]}; then give a new folder"

    @property
    def way_to_resume(self) -> str:
        """What a message tells the user to do with a run that has ended too early."""
        return "begin again; no folder was given" if self.folder is None else "resume it with --resume, or resume=True"

    def add_to_log(self, record: dict[str, Any]) -> None:
        """Append a record to the log, and send its numbers to TensorBoard."""
        self.log.append(record)
        if self._writes:
            write_text(cast("Path", self.folder) / LOG, "".join(json.dumps(line) + "\n" for line in self.log))
        phase = record["phase"]
        numbers = {f"{phase}/{name}": value for name, value in record.items() if isinstance(value, float | int)}
        self.accelerator.log(numbers, step=record["step"])

    def write_checkpoint(self, phase: Phase, step_count: int, parts: Mapping[str, Any]) -> None:
        """Write the state of all parts after `step_count` steps of a phase.

        Raises:
            TrainingError: When it cannot be written.
        """
        if self._writes:
            states = {name: part.state_dict() for name, part in parts.items()}
            kept = cast("Kept", self.results)
            checkpoint = Checkpoint(
                phase=phase, step=step_count, parts=states, kept=kept, rounds=self.rounds, log=self.log
            )
            checkpoint_file.write(cast("Path", self.folder) / CHECKPOINT, checkpoint)
        self.accelerator.wait_for_everyone()

    def restore_checkpoint_(self, phase: Phase, step_count: int, parts: Mapping[str, Any]) -> int:
        """Load the state of all parts if the run resumes inside this phase; return the number of steps it has done.

        Args:
            phase: The phase that begins.
            step_count: Number of its steps.
            parts: The objects whose state a checkpoint holds.

        Raises:
            TrainingError: When the checkpoint is not one of this run.
        """
        checkpoint = self.resumed
        if checkpoint is None or checkpoint.phase != phase:
            return 0
        try:
            if checkpoint.step > step_count:
                raise ValueError(f"it has {checkpoint.step} steps of {phase}, the recipe {step_count}")  # noqa: TRY301
            for name, part in parts.items():
                part.load_state_dict(checkpoint.parts[name])
        except Exception as error:  # whatever torch's and timm's classes raise
            raise self._foreign_checkpoint(last_line(error)) from error
        return checkpoint.step

    def check_sites(self, names: Collection[str]) -> None:
        """Refuse a checkpoint whose rounds have ranks of other sites than the network, before anything is trained.

        Raises:
            TrainingError: When it has.
        """
        for entry in self.rounds:
            if unknown := entry["ranks"].keys() ^ set(names):
                raise self._foreign_checkpoint(f"{min(unknown)!r} is a site of the network or of a round only")

    def _foreign_checkpoint(self, reason: str) -> TrainingError:
        return TrainingError(
            f"{cast('Path', self.folder) / CHECKPOINT} is no checkpoint of this run: {reason}. Start again in a new "
            "folder, without --resume."
        )

    def finish(self, model: nn.Module, facts: dict[str, Any]) -> None:
        """Save the network, its report, a picture of the ranks and the result, and delete the checkpoint.

        Raises:
            TrainingError: When one of the files cannot be written.
        """
        self.accelerator.end_training()
        if not self._writes:
            return
        from batude_fx.report.figures import pictures, write_png

        folder = cast("Path", self.folder)
        machine = {
            "device": str(self.accelerator.device), "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(), **library_versions("python"),
        }  # fmt: skip
        versions = library_versions(*_LIBRARIES)
        facts = {**facts, "seed": self.recipe.seed, "machine": machine, "versions": versions, "log": self.log}
        try:
            save(model, folder / TRAINED_NETWORK)
            write_png(pictures(cast("Record", attached_record(model)))["ranks"], folder / PICTURE)
            write_text(folder / RESULT, json.dumps(facts, indent=2) + "\n")
            (folder / CHECKPOINT).unlink(missing_ok=True)
        except (OSError, SavedModelError) as error:
            raise TrainingError(
                f"the trained network cannot be written: {last_line(error)}. Its checkpoint stays; when that is "
                "mended, resume it with --resume."
            ) from error


def _reason(error: Exception) -> str:
    """Return what is wrong, from the last line of an error; a process that loads images sends its whole traceback."""
    line = last_line(error)
    return re.sub(r"^[\w.]+: ", "", line) if str(error).startswith("Caught ") else line


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_write(folder: Path, error: OSError) -> TrainingError:
    return TrainingError(f"{folder} cannot be written: {error.strerror}. Choose another folder.")


@contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Give accelerate a fresh state, as it has one for the whole process, and restore that of the caller afterwards.

    The state of the processes, `PartialState`, is kept; where there is none yet, none is left behind.
    """
    classes = AcceleratorState, GradientState, PartialState
    before = [dict(state._shared_state) for state in classes]  # noqa: SLF001 - there is no public access to it
    for state in classes[:2]:
        state._reset_state()  # noqa: SLF001 - accelerate refuses a second run with another precision
    try:
        yield
    finally:
        for state, values in zip(classes, before, strict=True):
            state._shared_state.clear()  # noqa: SLF001
            state._shared_state.update(values)  # noqa: SLF001


def _accelerator(recipe: Recipe, folder: Path | None) -> Accelerator:
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
    try:
        check_writable(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
