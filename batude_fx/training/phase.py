"""One phase of training: steps with timm's optimizer and schedule, evaluations and checkpoints.

The random numbers of a step depend only on the seed, the phase and the index of the step, and the learning rate only on
the index. A run that is resumed from a checkpoint therefore continues as if it had not been interrupted, bit-equal on
CPUs.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from batude_fx.errors import TrainingError
from batude_fx.quality.quality import Quality
from batude_fx.support.numbers import human
from batude_fx.support.progress import Bar
from batude_fx.training.checkpoint_file import Phase
from batude_fx.training.data import Batch, seed_all
from batude_fx.training.recipe import DataSection, Distillation, Training
from batude_fx.training.rounds import Rounds
from batude_fx.training.session import PHASES, Session
from batude_fx.training.teacher import Teacher

_PREPARED = "_is_accelerate_prepared", "_original_forward", "forward"  # attributes that accelerate sets


def run_phase(
    session: Session, phase: Phase, settings: Training, model: nn.Module, teacher: Teacher | None = None,
    rounds: Rounds | None = None,
) -> int:  # fmt: skip
    """Train a network for one phase, in place.

    A compressed network that is trained without labels ends as it was in the evaluation in which it came closest to the
    original, one before the first step among them.

    Args:
        session: The run.
        phase: Name of the phase.
        settings: The recipe's section for the phase.
        model: The network.
        teacher: What distils the original network.
        rounds: The rounds of BC-ADL, in the phase that learns ranks.

    Returns:
        The number of steps that are done: all of them, but for a network that is restored.

    Raises:
        TrainingError: When the loss is not finite, a step fails, or the run is interrupted; it can be resumed then. A
            network that is restored for `compress` is returned as it came closest instead.
    """
    if session.is_interrupted(0):
        if session.restores:
            return 0
        raise TrainingError(f"interrupted before {phase}; {session.way_to_resume}.") from KeyboardInterrupt()
    step_count = settings.epochs.steps(session.steps_per_epoch)
    with _trained_parameters(model, settings), _unprepared(model):
        return _train(_Trainer(session, phase, settings, model, teacher, rounds), step_count)


def _train(trainer: "_Trainer", step_count: int) -> int:
    """Train until the phase ends or is interrupted; return the number of steps that are done."""
    session, phase, model, rounds = trainer.session, trainer.phase, trainer.model, trainer.rounds
    start = session.restore_checkpoint_(phase, step_count, trainer.parts)
    bar = Bar(phase, step_count, start, visible=session.accelerator.is_main_process, prints=not session.restores)
    with bar, session.explaining(lambda: f"step {bar.done + 1} of {phase}"):
        if trainer.closest and not start:
            bar.line(trainer.evaluate(0, None))
        for step, batches in _remaining_steps(session, phase, start, step_count):
            if rounds and rounds.begin_if_due(step):
                bar.line(training_line(session.log[-1]))
            loss = trainer.step(step, batches)
            bar.advance()
            is_stopped = session.is_interrupted(bar.done)
            if trainer.has_to_end(bar.done, loss, is_stopped=is_stopped):
                break
            _evaluate_and_save(trainer, bar, step_count, loss, is_stopped=is_stopped)
            if is_stopped:
                reason = f"interrupted after step {bar.done} of {phase}; {session.way_to_resume}."
                raise TrainingError(reason) from KeyboardInterrupt()  # from which the command line knows its exit code
        if rounds:
            rounds.end(step_count)
            bar.line(training_line(session.log[-1]))
    if final := trainer.closest or trainer.average:
        model.load_state_dict(final.module.state_dict())
    session.accelerator.free_memory()
    return bar.done


@contextmanager
def _trained_parameters(model: nn.Module, settings: Training) -> Iterator[None]:
    """Let no weights have gradients in a block if their learning rate is 0."""
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if getattr(settings, "weights_lr", None) == 0:
        for parameter, value in needed.items():
            parameter.requires_grad = value and parameter.ndim <= 1
    try:
        yield
    finally:
        for parameter, value in needed.items():
            parameter.requires_grad = value


@contextmanager
def _unprepared(model: nn.Module) -> Iterator[None]:
    """Remove what accelerate leaves in a network, by which another Accelerator would take it for prepared already."""
    before = {name: vars(model)[name] for name in _PREPARED if name in vars(model)}
    try:
        yield
    finally:
        for name in _PREPARED:
            vars(model).pop(name, None)
        vars(model).update(before)


def _evaluate_and_save(trainer: "_Trainer", bar: Bar, step_count: int, loss: Tensor, *, is_stopped: bool) -> None:
    """Evaluate the network and write a checkpoint, where they are due after the steps that are done."""
    session, done = trainer.session, bar.done
    is_last = done == step_count
    if (session.is_due(session.recipe.eval.interval, done) and not is_stopped) or is_last:
        bar.line(trainer.evaluate(done, loss))
    if session.is_due(session.recipe.eval.checkpoint, done) or is_last or is_stopped:
        trainer.check_loss(done, loss)  # a checkpoint of a diverged run would be useless
        session.write_checkpoint(trainer.phase, done, trainer.parts)


def _remaining_steps(session: Session, phase: Phase, start: int, step_count: int) -> Iterator[tuple[int, list[Batch]]]:
    """Yield the steps of a phase from `start` on, each with its batches."""
    batches_per_step = session.recipe.data.accumulate
    epoch, done = divmod(start, session.steps_per_epoch)
    step = start
    while step < step_count:
        # Epochs of different phases have different numbers, so that they differ in order and augmentation.
        batches = session.data.train(1000 * PHASES.index(phase) + epoch, done * batches_per_step)
        for _ in range(done, min(session.steps_per_epoch, done + step_count - step)):
            yield step, [next(batches) for _ in range(batches_per_step)]
            step += 1
        epoch, done = epoch + 1, 0


def _build_optimizer(settings: Training, model: nn.Module) -> torch.optim.Optimizer:
    weights_lr = getattr(settings, "weights_lr", None)

    def two_groups(model: nn.Module) -> list[dict[str, Any]]:
        gains_and_biases, weights = list[Tensor](), list[Tensor]()
        for parameter in model.parameters():
            (weights if parameter.ndim > 1 else gains_and_biases).append(parameter)
        groups = [
            {"params": gains_and_biases, "weight_decay": 0.0},
            {"params": weights, "weight_decay": settings.weight_decay, "lr_scale": (weights_lr or 0.0) / settings.lr},
        ]
        return [group for group in groups if group["params"]]

    return create_optimizer_v2(
        model, settings.optimizer, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
        param_group_fn=None if weights_lr is None else two_groups,
    )  # fmt: skip


def _build_scheduler(settings: Training, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """Return timm's scheduler. timm counts in epochs; `updates_per_epoch=1` makes each of its epochs one step."""
    step_count = settings.epochs.steps(steps_per_epoch)
    # A "step" schedule with a decay rate of 1 is constant; older versions of timm have no "constant".
    name = "step" if settings.scheduler == "constant" else settings.scheduler
    scheduler: Scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer, name, num_epochs=max(1, step_count), min_lr=settings.min_lr,
        warmup_epochs=settings.warmup.steps(steps_per_epoch, step_count), warmup_lr=0.0,
        decay_rate=1.0,  # also the power of a "poly" schedule, which makes it linear
        step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    return scheduler


def _build_average(settings: Training, model: nn.Module) -> ModelEmaV3 | None:
    """Return the moving average of the weights, where the phase has one."""
    decay = getattr(settings, "ema", None)
    return ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None


class _Closest:
    """The network of the evaluation that came closest to the original, in the state of a copy.

    Attributes:
        module: The copy.
        distance: How far it is from the original; infinite before the first evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model)
        self.distance = math.inf

    def offer(self, model: nn.Module, distance: float | None) -> None:
        """Keep the state of a network that is closer than all before."""
        if distance is not None and distance < self.distance:
            self.module.load_state_dict(model.state_dict())
            self.distance = distance

    def state_dict(self) -> dict[str, Any]:
        """Return everything for checkpoints."""
        return {"module": self.module.state_dict(), "distance": self.distance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.distance = state["distance"]


def _build_mixup(data: DataSection, classes: int) -> Mixup | None:
    """Return timm's mixup and cutmix, where the recipe has one of them."""
    if not (data.mixup or data.cutmix):
        return None
    return Mixup(data.mixup, data.cutmix, label_smoothing=data.smoothing, num_classes=classes)  # type: ignore[no-untyped-call]


class _Trainer:
    """A network and everything that trains it in one phase.

    Attributes:
        average: The moving average of the weights, where the recipe has one.
        closest: The compressed network that came closest to the original, where there are no labels.
        parts: The objects whose state a checkpoint holds.
    """

    def __init__(
        self, session: Session, phase: Phase, settings: Training, model: nn.Module, teacher: Teacher | None,
        rounds: Rounds | None,
    ) -> None:  # fmt: skip
        accelerator = session.accelerator
        self.session, self.phase, self.settings = session, phase, settings
        self.model, self.teacher = model.to(accelerator.device), teacher
        self.rounds, self.lagrangian = rounds, rounds.lagrangian if rounds else None
        optimizer = _build_optimizer(settings, model)
        self.scheduler = _build_scheduler(settings, optimizer, session.steps_per_epoch)
        self.distillation: Distillation | None = getattr(settings, "distillation", None)
        self.average = _build_average(settings, model)
        self.closest = _Closest(model) if phase == "finalize" and not session.recipe.data.labels else None
        self.mixup = _build_mixup(session.recipe.data, session.classes)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        # `prepare` also replaces the model's forward by one under autocast; calibration needs the original.
        accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.parts = self._parts()

    def _parts(self) -> dict[str, Any]:
        parts = {  # the keys are those of earlier checkpoints; "split" is the state of BC-ADL
            "model": self.model, "optimizer": self.optimizer, "scaler": self.session.accelerator.scaler,
            "average": self.average and self.average.module, "split": self.lagrangian, "closest": self.closest,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def step(self, step: int, batches: list[Batch]) -> Tensor:
        """Do one step of the optimizer, and return the mean loss of its batches over all processes, a scalar."""
        accelerator = self.session.accelerator
        seed_all(self.session.recipe.seed, PHASES.index(self.phase), step, accelerator.process_index)
        self.scheduler.step_update(step)
        self.model.train(not getattr(self.settings, "fixed_statistics", False))
        total = torch.zeros((), device=accelerator.device)
        for index, (images, labels) in enumerate(batches, 1):
            # Gradients are accumulated; processes exchange them only at the last batch.
            with nullcontext() if index == len(batches) else accelerator.no_sync(self.wrapped):
                loss = self._loss(self.session.to_device(images), labels.to(accelerator.device)) / len(batches)
                accelerator.backward(loss)
            total += loss.detach()
        accelerator.unscale_gradients()
        if self.lagrangian:
            self.lagrangian.penalty_()
        if self.settings.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.model, step)
        mean: Tensor = accelerator.reduce(total, "mean")
        return mean

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss () of images (n, C, H, W) with classes (n,): cross-entropy, mixed with distillation."""
        smoothing = self.session.recipe.data.smoothing
        if self.mixup:
            images, labels = self.mixup(images.clone(), labels)  # in place; labels (n, classes), already smoothed
            smoothing = 0.0
        if self.distillation is None or self.teacher is None:
            return F.cross_entropy(self._logits(self._outputs(images)), labels, label_smoothing=smoothing)
        with self.teacher.observe(self.model) as stages:
            outputs = self._outputs(images)
        with self.session.accelerator.autocast():
            lesson = self.teacher.loss(images, outputs, stages)
        if not self.session.recipe.data.labels:
            return lesson
        weight = self.distillation.weight
        loss = F.cross_entropy(self._logits(outputs), labels, label_smoothing=smoothing)
        return (1 - weight) * loss + weight * lesson

    def _outputs(self, images: Tensor) -> Any:  # noqa: ANN401 - whatever a network gives that is no classifier
        with self.session.accelerator.autocast():
            return self.teacher.run(self.wrapped, images) if self.teacher else self.wrapped(images)

    def _logits(self, outputs: object) -> Tensor:
        """Return the logits (n, classes) in float32; some networks return more than logits in training mode."""
        if not isinstance(outputs, Tensor):
            raise TrainingError(
                f"in training mode {type(self.model).__name__} gives {type(outputs).__name__}, not logits alone; "
                "switch further outputs off, such as by --set model.args.aux_logits=false."
            )
        return outputs.float()

    def has_to_end(self, done: int, loss: Tensor, *, is_stopped: bool) -> bool:
        """Return whether restoring ends here, with the closest network.

        Args:
            done: Number of steps that are done.
            loss: That of the last step; after one that is not finite, no step would be better.
            is_stopped: Whether the run was interrupted.
        """
        if not self.session.restores:
            return False
        if is_stopped and loss.isfinite():
            self.evaluate(done, loss)
        return is_stopped or not loss.isfinite()

    def check_loss(self, done: int, loss: Tensor) -> None:
        """Refuse to continue with a loss that is not finite.

        Raises:
            TrainingError: When it is not.
        """
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is {float(loss)} after step {done} of {self.phase}. "
                f"{self.session.way_to_converge(self.phase, self.settings.lr)}."
            )

    def evaluate(self, done: int, loss: Tensor | None) -> str:
        """Measure how good the network is after `done` steps, the last of which had a loss; log it, return the line."""
        session = self.session
        record: dict[str, Any] = {"phase": self.phase, "step": done, "epoch": done / session.steps_per_epoch}
        if loss is not None:
            self.check_loss(done, loss)
            record |= {"loss": float(loss), "lr": self.optimizer.param_groups[0]["lr"]}
        model = self.average.module if self.average else self.model
        if session.recipe.data.labels:
            record["accuracy"] = accuracy(session, model)
        else:
            quality = measure_quality(session, model)
            record |= {"distance": quality.distance, "agreement": quality.agreement and quality.agreement.value}
            if self.closest:
                self.closest.offer(model, quality.distance)
        session.add_to_log(record)
        return training_line(record)


def measure_quality(session: Session, model: nn.Module) -> Quality:
    """Return how close a network is to the original on the evaluation images, both in the precision of their weights.

    Raises:
        TrainingError: When there are no images, or one cannot be read.
    """
    session.share_buffers_(model)
    with session.explaining(lambda: "the evaluation"):
        quality = session.meter.measure(model)
    if quality is None:
        raise TrainingError("there are no images to measure quality on.")
    return quality


@torch.no_grad()
def accuracy(session: Session, model: nn.Module) -> float:
    """Return the share of the evaluation images that are classified correctly; leaves the model in eval mode.

    Raises:
        TrainingError: When there are no images, or one cannot be read.
    """
    accelerator = session.accelerator
    model.to(accelerator.device)
    model.eval()
    session.share_buffers_(model)
    correct: list[Tensor] = []
    with session.explaining(lambda: "the evaluation"):
        for images, labels in session.data.evaluation():
            with accelerator.autocast():
                is_correct = model(session.to_device(images)).argmax(1) == labels.to(accelerator.device)
            correct.append(accelerator.gather_for_metrics(is_correct))
    if not correct:
        raise TrainingError("there are no images to measure accuracy on.")
    return float(torch.cat(correct).float().mean())


def training_line(record: dict[str, Any]) -> str:
    """Return the line that is printed for a record of the log: an evaluation, or a round of BC-ADL."""
    start = f"{record['phase']:<9} step {record['step']:>6}"
    if "round" in record:
        return (
            f"{start}  round {record['round']:>3}  primal {record['primal']:.3f}  dual {record['dual']:.3f}  "
            f"rho {record['rho']:.2g}  ranks need {human(record['flops'])}FLOPs ({record['keep']:.1%})"
        )
    parts = [start, f"epoch {record['epoch']:6.2f}"]
    forms = {"loss": "loss {:.4f}", "distance": "distance {:.4f}", "agreement": "agreement {:.1%}",
             "accuracy": "accuracy {:.2%}", "lr": "lr {:.2g}"}  # fmt: skip
    parts += [form.format(record[name]) for name, form in forms.items() if record.get(name) is not None]
    return "  ".join(parts)
