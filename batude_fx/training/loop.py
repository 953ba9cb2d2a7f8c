"""One training run, in time order: the dense network, ranks learned under the budget, Tucker modules trained on.

The method is behind four calls to `adl.Lagrangian`: `penalty_` in every step, and `project_`, `update_duals_` and
`rescale_` between rounds. All that is random in a step follows from the seed and the number of the step, so a run that
goes on from a checkpoint repeats what it would have done, to the bit on a CPU.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from safetensors.torch import save_model
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from batude_fx.allocation import Integers, Options
from batude_fx.borrowing import borrowed
from batude_fx.calibration import normalized_by
from batude_fx.capacity import capacity, choices
from batude_fx.discovery import discover
from batude_fx.errors import TrainingError
from batude_fx.flops import count_flops
from batude_fx.measuring import statistics
from batude_fx.plugin import create
from batude_fx.progress import Bar
from batude_fx.recipe import Distillation, Duration, ModelSection, OneShot, Recipe, Training
from batude_fx.report import training_line
from batude_fx.serialization import load_weights_, read_weights, save
from batude_fx.sites import ConvSite, Ranks
from batude_fx.surgery import build_skeleton, copied
from batude_fx.training import checkpoint
from batude_fx.training.adl import Constraint, Lagrangian
from batude_fx.training.data import Batch, Data, first_images, image_data, seed_all
from batude_fx.training.finalize import factored
from batude_fx.zoo import example_inputs

CHECKPOINT, ORIGINAL, RECIPE, LOG, REPORT, MODEL = (
    "checkpoint.safetensors", "original.safetensors", "recipe.yaml", "log.jsonl", "report.json", "model",
)  # fmt: skip
PHASES = ("pretrain", "one_shot", "finalize")


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        model: The compressed network, in eval mode.
        accuracy: Its share of the evaluation images.
        original_accuracy: That of the dense network before one-shot training.
        flops: Multiply-adds of one image, by fvcore.
        dense_flops: Those of the dense network.
        params: Parameters.
        dense_params: Those of the dense network.
        ranks: Site name to ranks, for the sites in Tucker form.
        rounds: One record per round of BC-ADL: residuals, rho, flops and ranks as they stood.
    """

    model: nn.Module = field(repr=False)
    accuracy: float
    original_accuracy: float
    flops: int
    dense_flops: int
    params: int
    dense_params: int
    ranks: Mapping[str, Ranks]
    rounds: list[dict[str, Any]] = field(repr=False)


def train(recipe: Recipe, folder: str | os.PathLike[str] | None, *, resume: bool, data: Data | None) -> Result:
    """See `batude_fx.run`."""
    place = None if folder is None else Path(folder)
    session = _Session(recipe, place, _accelerator(recipe, place), resume=resume)
    with session.accelerator.main_process_first():  # one process fetches what the others find in the cache
        model = dense_network(recipe.model)
    problem = Problem.of(model, recipe)  # a budget out of reach is said before anything is trained
    session.classes = problem.classes
    session.data = data or image_data(recipe, model, session.accelerator)

    if recipe.pretrain and session.begins("pretrain"):
        model = _phase(session, "pretrain", recipe.pretrain, model)
    model = session.original(model)
    teacher = copied(model).eval().requires_grad_(requires_grad=False)
    original_accuracy = session.once("original_accuracy", lambda: _accuracy(session, teacher))

    split = Lagrangian(problem.constraints(model), rho=recipe.one_shot.rho[0], soft=recipe.one_shot.threshold == "soft")
    if session.begins("one_shot"):
        rounds = _Rounds(session, recipe.one_shot, problem, split)
        model = _phase(session, "one_shot", recipe.one_shot, model, teacher, rounds)
        session.kept["ranks"] = split.state_dict()["ranks"]
    ranks = {name: Ranks(*pair) for name, pair in session.kept["ranks"].items() if pair}

    if session.begins("finalize") and not session.is_resumed("finalize"):
        small = factored(model, ranks, hooi_sweeps=recipe.finalize.hooi_sweeps)
    else:
        small = build_skeleton(model, ranks)
    small = _phase(session, "finalize", recipe.finalize, small, teacher)
    if recipe.finalize.batch_norm_images:
        images = first_images(session.data, recipe.finalize.batch_norm_images, session.accelerator.device)
        small = normalized_by(small, [(batch,) for batch in images])

    result = Result(
        model=small.eval(), accuracy=_accuracy(session, small), original_accuracy=original_accuracy,
        flops=count_flops(small, problem.inputs), dense_flops=problem.dense[0],
        params=sum(parameter.numel() for parameter in small.parameters()), dense_params=problem.dense[1],
        ranks=ranks, rounds=session.rounds,
    )  # fmt: skip
    session.finish(result)
    return result


def dense_network(section: ModelSection, *, weights: bool = True) -> nn.Module:
    """The network that a recipe starts from.

    Args:
        section: The recipe's `model`.
        weights: Whether to fetch or read its weights.
    """
    model = create(section.name, pretrained=section.pretrained and weights, **section.args)
    if section.checkpoint and weights:
        load_weights_(model, read_weights(section.checkpoint))
    return model.to(memory_format=torch.channels_last) if section.channels_last else model


@dataclass(frozen=True)
class Problem:
    """What is to be compressed, and how far.

    Attributes:
        inputs: Example input that flops are counted on.
        sites: Site name to site, all of them replaceable.
        options: Site name to what the site can be.
        dense: Flops and parameters of the dense network.
        classes: Number of its outputs.
        most: (2,) flops and parameters that all sites together may need.
    """

    inputs: tuple[object, ...]
    sites: Mapping[str, ConvSite]
    options: Mapping[str, Options]
    dense: tuple[int, int]
    classes: int
    most: Integers

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> "Problem":
        """The problem of a recipe.

        Raises:
            BudgetError: The budget is out of reach.
        """
        wanted, inputs = recipe.one_shot, example_inputs(model)
        found = discover(model, inputs, layers=wanted.layers, include=wanted.include, exclude=wanted.exclude)
        sites = {site.name: site for site in found if site.skip_reason is None}
        options = choices(sites, wanted.round_to, {}, adds_bias=False)
        dense = count_flops(model, inputs), sum(parameter.numel() for parameter in model.parameters())
        most, _ = capacity(options.values(), recipe.budget, dense, wanted.round_to)
        return cls(inputs, sites, options, dense, _classes(model, inputs), most)

    def constraints(self, model: nn.Module) -> dict[str, Constraint]:
        """Every site with its layer in a model."""
        return {
            name: Constraint(one, model.get_submodule(name), self.options[name]) for name, one in self.sites.items()
        }

    def limit(self, share: float) -> Integers:
        """(2,) what all sites may need when a share of the way from dense to the budget is gone."""
        dense = np.sum([one.dense for one in self.options.values()], axis=0)
        return np.where(self.most < dense, (dense + share * (self.most - dense)).astype(np.int64), self.most)


@torch.no_grad()
def _classes(model: nn.Module, inputs: tuple[object, ...]) -> int:
    with borrowed(model):
        outputs = model(*inputs)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:  # noqa: PLR2004 - (n, classes)
        raise TrainingError(f"{type(model).__name__} is no classifier; recipes train networks with one logit per class.")
    return outputs.shape[1]


def _accelerator(recipe: Recipe, folder: Path | None) -> Accelerator:
    tracked = folder is not None and find_spec("tensorboard") is not None
    accelerator = Accelerator(
        mixed_precision=recipe.model.precision,
        gradient_accumulation_steps=recipe.data.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=recipe.seed),
        log_with="tensorboard" if tracked else None,
        project_dir=folder if tracked else None,
        step_scheduler_with_optimizer=False,
    )
    if tracked:
        accelerator.init_trackers("tensorboard")
    return accelerator


class _Session:
    """What all phases share: the machine, the images, the folder, and what is known so far."""

    def __init__(self, recipe: Recipe, folder: Path | None, accelerator: Accelerator, *, resume: bool) -> None:
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.data = cast("Data", None)
        self.classes = 0
        self.kept: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.resumed: dict[str, Any] = {}
        if resume:
            self._go_on()
        elif folder is not None and accelerator.is_main_process:
            _check_new(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        accelerator.wait_for_everyone()

    def _go_on(self) -> None:
        if self.folder is None:
            raise TrainingError("resume needs the folder of the run to go on with.")
        path = self.folder / RECIPE
        if not path.is_file():
            raise TrainingError(f"{self.folder} holds no run to go on with; start without --resume.")
        if path.read_text(encoding="utf-8") != self.recipe.to_yaml():
            raise TrainingError(f"{path} is another recipe than the one to go on with; give the same, or a new folder.")
        if (self.folder / REPORT).is_file():
            raise TrainingError(f"the run in {self.folder} is finished; see {REPORT} there, or give a new folder.")
        if not (self.folder / CHECKPOINT).is_file():
            return  # killed before the first one
        self.resumed = checkpoint.read(self.folder / CHECKPOINT)
        self.kept, self.rounds, self.log = (self.resumed[name] for name in ("kept", "rounds", "log"))

    @property
    def per_epoch(self) -> int:
        """Optimizer steps."""
        return self.data.batches // self.recipe.data.accumulate

    def placed(self, images: Tensor) -> Tensor:
        """Images on the device, in the memory format of the recipe."""
        last = images.ndim == 4 and self.recipe.model.channels_last  # noqa: PLR2004 - (n, C, H, W)
        return images.to(self.accelerator.device, memory_format=torch.channels_last if last else torch.preserve_format)

    def begins(self, phase: str) -> bool:
        """Whether a phase is still to be done, or to be gone on with."""
        return not self.resumed or PHASES.index(phase) >= PHASES.index(self.resumed["phase"])

    def is_resumed(self, phase: str) -> bool:
        """Whether the run goes on inside this phase."""
        return bool(self.resumed) and self.resumed["phase"] == phase

    def original(self, model: nn.Module) -> nn.Module:
        """Keep the weights that one-shot training starts from, or get them back."""
        if self.folder is None:
            return model
        path = self.folder / ORIGINAL
        if self.resumed and self.resumed["phase"] != "pretrain":
            load_weights_(model, read_weights(path))
        elif self.accelerator.is_main_process:
            save_model(model, str(path))
        return model

    def once(self, name: str, compute: Any) -> Any:  # noqa: ANN401 - a number
        """A number that is computed once, however often the run is killed."""
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]

    def note(self, record: dict[str, Any]) -> None:
        """A line of the log; numbers go to the trackers too."""
        self.log.append(record)
        if self.folder is not None and self.accelerator.is_main_process:
            with (self.folder / LOG).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.log)
        numbers = {f"{record['phase']}/{k}": v for k, v in record.items() if isinstance(v, float | int)}
        self.accelerator.log(numbers, step=record["step"])

    def write(self, phase: str, step: int, parts: Mapping[str, Any]) -> None:
        """A checkpoint: `step` steps of the phase are done."""
        if self.folder is not None and self.accelerator.is_main_process:
            state = {name: part.state_dict() for name, part in parts.items()}
            shared = {"kept": self.kept, "rounds": self.rounds, "log": self.log}
            checkpoint.write(self.folder / CHECKPOINT, {"phase": phase, "step": step, "parts": state, **shared})
        self.accelerator.wait_for_everyone()

    def finish(self, result: Result) -> None:
        """Save the network and the report, and drop the checkpoint."""
        self.accelerator.end_training()
        if self.folder is None or not self.accelerator.is_main_process:
            return
        save(result.model, self.folder / MODEL)
        facts = {k: v for k, v in vars(result).items() if k not in {"model", "ranks"}}
        facts["ranks"] = {name: asdict(ranks) for name, ranks in result.ranks.items()}
        libraries = ("batude-fx", "torch", "timm", "torchvision", "accelerate")
        facts |= {"seed": self.recipe.seed, "versions": {name: version(name) for name in libraries}, "log": self.log}
        temporary = self.folder / f".{REPORT}.tmp"
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.folder / REPORT)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


def _check_new(folder: Path) -> None:
    if (folder / RECIPE).exists():
        raise TrainingError(f"{folder} holds a run already; go on with it by --resume, or give a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise TrainingError(f"{folder} holds other files; give a new folder.")


class _Rounds:
    """The outer iteration of BC-ADL: when to project, under which budget, with which rho."""

    def __init__(self, session: _Session, settings: OneShot, problem: Problem, split: Lagrangian) -> None:
        self.session, self.settings, self.problem, self.split = session, settings, problem, split
        self.steps = settings.epochs.steps(session.per_epoch)
        self.interval = max(1, settings.interval.steps(session.per_epoch, self.steps))
        self.count = max(1, math.ceil(self.steps / self.interval))

    def begin(self, step: int, model: nn.Module) -> None:
        """At the first step of a round: find its ranks, move z and u, set rho."""
        index = step // self.interval
        self._project(model, index)
        low, high = self.settings.rho
        rho = low * (high / low) ** (index / max(1, self.count - 1))
        residuals = self.split.update_duals_() if index else self.split.residuals()
        self.split.rescale_(rho)
        self._note(step, index, residuals)

    def end(self, model: nn.Module) -> None:
        """After the last step: the ranks that the network is finalized with."""
        self._project(model, self.count)
        self._note(self.steps, self.count, self.split.residuals())

    def _project(self, model: nn.Module, index: int) -> None:
        annealed = max(1.0, self.settings.anneal * self.count)
        metrics = None
        if self.settings.calibration_images:
            device = self.session.accelerator.device
            batches = first_images(self.session.data, self.settings.calibration_images, device)
            parts = (part for batch in batches for part in batch.split(32))
            metrics = statistics(model, list(self.problem.sites.values()), ((part,) for part in parts))
        self.split.project_(self.problem.limit(min(1.0, (index + 1) / annealed)), metrics)

    def _note(self, step: int, index: int, residuals: Any) -> None:  # noqa: ANN401 - Residuals
        sites = sum(int(one.dense[0]) for one in self.problem.options.values())
        flops = self.problem.dense[0] - sites + self.split.flops
        record = {
            "phase": "one_shot", "step": step, "round": index, "primal": residuals.primal, "dual": residuals.dual,
            "rho": self.split.rho, "flops": flops, "keep": flops / self.problem.dense[0],
        }  # fmt: skip
        self.session.note(record)
        self.session.rounds.append({**record, "ranks": self.split.state_dict()["ranks"]})


def _phase(
    session: _Session, phase: str, settings: Training, model: nn.Module, teacher: nn.Module | None = None,
    rounds: _Rounds | None = None,
) -> nn.Module:  # fmt: skip
    """Train a network for one phase; it is changed in place."""
    recipe, accelerator = session.recipe, session.accelerator
    steps = settings.epochs.steps(session.per_epoch)
    if not steps and rounds is None:
        return model
    model.to(accelerator.device).train()
    optimizer = create_optimizer_v2(
        model, settings.optimizer, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, settings.scheduler, num_epochs=max(1, steps), min_lr=settings.min_lr, decay_rate=1.0,
        warmup_epochs=settings.warmup.steps(session.per_epoch, steps), warmup_lr=0.0, step_on_epochs=False,
        updates_per_epoch=1,
    )  # fmt: skip
    decay = getattr(settings, "ema", None)
    average = ModelEmaV3(model, decay=decay) if decay else None
    loss_of = _Loss(session, settings.distillation, teacher)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # the autocast is ours
    parts = {
        "model": model, "optimizer": optimizer, "scaler": accelerator.scaler,
        "average": average and average.module, "split": rounds and rounds.split,
    }  # fmt: skip
    parts = {name: part for name, part in parts.items() if part is not None}
    start = _restored(session, phase, parts)

    with Bar(phase, steps, start, shown=accelerator.is_main_process) as bar:
        for step, batches in _steps(session, phase, start, steps):
            seed_all(recipe.seed, PHASES.index(phase), step, accelerator.process_index)
            scheduler.step_update(step)
            if rounds and step % rounds.interval == 0:
                rounds.begin(step, model)
                bar.line(training_line(session.log[-1]))
                model.train()
            total = torch.zeros((), device=accelerator.device)
            for images, labels in batches:
                with accelerator.accumulate(wrapped):
                    loss = loss_of(wrapped, session.placed(images), labels.to(accelerator.device))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.unscale_gradients()
                        if rounds:
                            rounds.split.penalty_()
                        if settings.clip_grad:
                            accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                total += loss.detach() / len(batches)
            if average:
                average.update(model, step)
            bar.advance()
            done = step + 1
            if done % _at_least_one(recipe.eval.interval, session) == 0 or done == steps:
                if not total.isfinite():
                    raise TrainingError(f"the loss is {float(total)} after step {done} of {phase}; lower {phase}.lr.")
                session.note({
                    "phase": phase, "step": done, "epoch": done / session.per_epoch, "loss": float(total),
                    "lr": optimizer.param_groups[0]["lr"],
                    "accuracy": _accuracy(session, average.module if average else model),
                })  # fmt: skip
                bar.line(training_line(session.log[-1]))
                model.train()
            if done % _at_least_one(recipe.eval.checkpoint, session) == 0 and done < steps:
                session.write(phase, done, parts)
    if rounds:
        rounds.end(model)
    if average:
        model.load_state_dict(average.module.state_dict())
    accelerator.free_memory()
    return model


def _at_least_one(length: Duration, session: _Session) -> int:
    return max(1, length.steps(session.per_epoch))


def _steps(session: _Session, phase: str, start: int, steps: int) -> Iterator[tuple[int, list[Batch]]]:
    """The steps that are left of a phase, each with its batches; every phase has epochs of its own."""
    parts = session.recipe.data.accumulate
    epoch, done = divmod(start, session.per_epoch)
    step = start
    while step < steps:
        batches = session.data.train(1000 * PHASES.index(phase) + epoch, done * parts)
        for _ in range(done, min(session.per_epoch, done + steps - step)):
            yield step, [next(batches) for _ in range(parts)]
            step += 1
        epoch, done = epoch + 1, 0


def _restored(session: _Session, phase: str, parts: Mapping[str, Any]) -> int:
    """Put a checkpoint's state in its places; how many steps of this phase are done."""
    if not session.is_resumed(phase):
        return 0
    for name, part in parts.items():
        part.load_state_dict(session.resumed["parts"][name])
    return int(session.resumed["step"])


class _Loss:
    """Cross-entropy with what the recipe adds: smoothing, mixup, and the original network's opinion."""

    def __init__(self, session: _Session, distillation: Distillation | None, teacher: nn.Module | None) -> None:
        data = session.recipe.data
        self.session, self.distillation, self.teacher = session, distillation, teacher
        self.smoothing = data.smoothing
        self.mixup: Mixup | None = None
        if data.mixup or data.cutmix:
            self.mixup = Mixup(  # type: ignore[no-untyped-call]
                data.mixup, data.cutmix, label_smoothing=data.smoothing, num_classes=session.classes
            )

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Of images (n, C, H, W) and classes (n,)."""
        if self.mixup:
            images, labels = self.mixup(images, labels)  # labels (n, classes)
        with self.session.accelerator.autocast():
            logits = model(images).float()  # (n, classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.0 if self.mixup else self.smoothing)
        if self.distillation is None or self.teacher is None:
            return loss
        with torch.no_grad(), self.session.accelerator.autocast():
            opinion = self.teacher(images).float()  # (n, classes)
        weight, temperature = self.distillation.weight, self.distillation.temperature
        told, known = (F.log_softmax(one / temperature, 1) for one in (logits, opinion))
        apart = F.kl_div(told, known, reduction="batchmean", log_target=True) * temperature**2
        return (1 - weight) * loss + weight * apart


@torch.no_grad()
def _accuracy(session: _Session, model: nn.Module) -> float:
    """Share of the evaluation images that get their class; the model is in eval mode afterwards."""
    model.to(session.accelerator.device).eval()
    hits: list[Tensor] = []
    for images, labels in session.data.evaluation():
        with session.accelerator.autocast():
            right = model(session.placed(images)).argmax(1) == labels.to(session.accelerator.device)
        hits.append(session.accelerator.gather_for_metrics(right))
    return float(torch.cat(hits).float().mean())
