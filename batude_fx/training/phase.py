"""One phase of training: steps with timm's optimizer and schedule, evaluations and checkpoints.

The random numbers of a step depend only on the seed, the phase and the index of the step, and the learning rate only on
the index. A run that is resumed from a checkpoint therefore continues as if it had not been interrupted, bit-equal on
CPUs.

Source of distillation: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531, section 2.
"""

from collections.abc import Iterator
from contextlib import nullcontext
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
from batude_fx.support.numbers import human
from batude_fx.support.progress import Bar
from batude_fx.training.checkpoint_file import Phase
from batude_fx.training.data import Batch, seed_all
from batude_fx.training.recipe import DataSection, Distillation, Training
from batude_fx.training.rounds import Rounds
from batude_fx.training.session import PHASES, Session


def run_phase(
    session: Session, phase: Phase, settings: Training, model: nn.Module, teacher: nn.Module | None = None,
    rounds: Rounds | None = None,
) -> None:  # fmt: skip
    """Train a network for one phase, in place.

    Args:
        session: The run.
        phase: Name of the phase.
        settings: The recipe's section for the phase.
        model: The network.
        teacher: The original network, for distillation.
        rounds: The rounds of BC-ADL, in the phase that learns ranks.

    Raises:
        TrainingError: When the loss is not finite, a step fails, or the run is interrupted; it can be resumed then.
    """
    if session.is_interrupted(0):
        raise TrainingError(f"interrupted before {phase}; {session.way_to_resume}.") from KeyboardInterrupt()
    step_count = settings.epochs.steps(session.steps_per_epoch)
    trainer = _Trainer(session, phase, settings, model, teacher, rounds)
    start = session.restore_checkpoint_(phase, step_count, trainer.parts)
    bar = Bar(phase, step_count, start, visible=session.accelerator.is_main_process)
    with bar, session.explaining(lambda: f"step {bar.done + 1} of {phase}"):
        for step, batches in _remaining_steps(session, phase, start, step_count):
            if rounds and rounds.begin_if_due(step):
                bar.line(training_line(session.log[-1]))
            loss = trainer.step(step, batches)
            bar.advance()
            done = step + 1
            is_last, is_stopped = done == step_count, session.is_interrupted(done)
            if (session.is_due(session.recipe.eval.interval, done) and not is_stopped) or is_last:
                trainer.evaluate(done, loss)
                bar.line(training_line(session.log[-1]))
            if session.is_due(session.recipe.eval.checkpoint, done) or is_last or is_stopped:
                trainer.check_loss(done, loss)  # a checkpoint of a diverged run would be useless
                session.write_checkpoint(phase, done, trainer.parts)
            if is_stopped:
                reason = f"interrupted after step {done} of {phase}; {session.way_to_resume}."
                raise TrainingError(reason) from KeyboardInterrupt()  # from which the command line knows its exit code
        if rounds:
            rounds.end(step_count)
            bar.line(training_line(session.log[-1]))
    if trainer.average:
        model.load_state_dict(trainer.average.module.state_dict())
    session.accelerator.free_memory()


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
    return create_optimizer_v2(
        model, settings.optimizer, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


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


def _build_mixup(data: DataSection, classes: int) -> Mixup | None:
    """Return timm's mixup and cutmix, where the recipe has one of them."""
    if not (data.mixup or data.cutmix):
        return None
    return Mixup(data.mixup, data.cutmix, label_smoothing=data.smoothing, num_classes=classes)  # type: ignore[no-untyped-call]


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the student's predictions from the teacher's, at a temperature.

    With p = softmax(teacher / T) and q = softmax(student / T), the loss is T^2 KL(p || q), in the mean over images. The
    gradient of KL(p || q) by the student's logits is (q - p) / T. For large T, q - p is itself proportional to 1 / T,
    since softmax(x / T) is linear in x / T there, so that the gradient shrinks as 1 / T^2. The factor T^2 undoes this:
    the weight of the loss relative to the cross-entropy keeps its meaning when T changes.

    Args:
        student_logits: (n, classes).
        teacher_logits: (n, classes).
        temperature: The T above; a larger one brings out the similarities that the teacher sees between classes.
    """
    student_log_probs = F.log_softmax(student_logits / temperature, 1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, 1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    return divergence * temperature**2


class _Trainer:
    """A network and everything that trains it in one phase.

    Attributes:
        average: The moving average of the weights, where the recipe has one.
        parts: The objects whose state a checkpoint holds.
    """

    def __init__(
        self, session: Session, phase: Phase, settings: Training, model: nn.Module, teacher: nn.Module | None,
        rounds: Rounds | None,
    ) -> None:  # fmt: skip
        accelerator = session.accelerator
        self.session, self.phase, self.settings = session, phase, settings
        self.model, self.teacher = model.to(accelerator.device), teacher
        self.lagrangian = rounds.lagrangian if rounds else None
        optimizer = _build_optimizer(settings, model)
        self.scheduler = _build_scheduler(settings, optimizer, session.steps_per_epoch)
        self.distillation: Distillation | None = getattr(settings, "distillation", None)
        self.average = _build_average(settings, model)
        self.mixup = _build_mixup(session.recipe.data, session.classes)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        # `prepare` also replaces the model's forward by one under autocast; calibration needs the original.
        accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.parts = self._parts()

    def _parts(self) -> dict[str, Any]:
        parts = {  # the keys are those of earlier checkpoints; "split" is the state of BC-ADL
            "model": self.model, "optimizer": self.optimizer, "scaler": self.session.accelerator.scaler,
            "average": self.average and self.average.module, "split": self.lagrangian,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def step(self, step: int, batches: list[Batch]) -> Tensor:
        """Do one step of the optimizer, and return the mean loss of its batches over all processes, a scalar."""
        accelerator = self.session.accelerator
        seed_all(self.session.recipe.seed, PHASES.index(self.phase), step, accelerator.process_index)
        self.scheduler.step_update(step)
        self.model.train()
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
        student_logits = self._student_logits(images)
        loss = F.cross_entropy(student_logits, labels, label_smoothing=smoothing)
        if self.distillation is None or self.teacher is None:
            return loss
        with torch.no_grad(), self.session.accelerator.autocast():
            teacher_logits = self.teacher(images).float()  # (n, classes)
        weight = self.distillation.weight
        divergence = distillation_loss(student_logits, teacher_logits, self.distillation.temperature)
        return (1 - weight) * loss + weight * divergence

    def _student_logits(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) in float32; some networks return more than logits in training mode."""
        with self.session.accelerator.autocast():
            outputs = self.wrapped(images)
        if not isinstance(outputs, Tensor):
            raise TrainingError(
                f"in training mode {type(self.model).__name__} gives {type(outputs).__name__}, not logits alone; "
                "switch further outputs off, such as by --set model.args.aux_logits=false."
            )
        return outputs.float()

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

    def evaluate(self, done: int, loss: Tensor) -> None:
        """Measure the accuracy after `done` steps, and add it to the log."""
        self.check_loss(done, loss)
        self.session.add_to_log({
            "phase": self.phase, "step": done, "epoch": done / self.session.steps_per_epoch, "loss": float(loss),
            "lr": self.optimizer.param_groups[0]["lr"],
            "accuracy": accuracy(self.session, self.average.module if self.average else self.model),
        })  # fmt: skip


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
    if "round" not in record:
        return (
            f"{start}  epoch {record['epoch']:6.2f}  loss {record['loss']:.4f}  accuracy {record['accuracy']:.2%}  "
            f"lr {record['lr']:.2g}"
        )
    return (
        f"{start}  round {record['round']:>3}  primal {record['primal']:.3f}  dual {record['dual']:.3f}  "
        f"rho {record['rho']:.2g}  ranks need {human(record['flops'])}FLOPs ({record['keep']:.1%})"
    )
