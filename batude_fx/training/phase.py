"""One phase of training: steps with timm's optimizer and schedule, evaluations, checkpoints.

All that is random in a step follows from the seed, the phase and the number of the step, and the learning rate is a
function of that number alone: a run that goes on from a checkpoint repeats what it would have done, to the bit on CPUs.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from batude_fx.errors import TrainingError
from batude_fx.support.numbers import human
from batude_fx.support.progress import Bar
from batude_fx.training.data import Batch, seed_all
from batude_fx.training.recipe import Distillation, Training
from batude_fx.training.rounds import Rounds
from batude_fx.training.session import PHASES, Session


def run_phase(
    session: Session, phase: str, settings: Training, model: nn.Module, teacher: nn.Module | None = None,
    rounds: Rounds | None = None,
) -> None:  # fmt: skip
    """Train a network for one phase, in place.

    Args:
        session: The run.
        phase: One of `PHASES`.
        settings: The recipe's section for it.
        model: The network.
        teacher: The original network, for distillation.
        rounds: Those of BC-ADL, where ranks are learned.

    Raises:
        TrainingError: When the loss is not finite.
    """
    steps = settings.epochs.steps(session.per_epoch)
    trainer = _Trainer(session, phase, settings, model, teacher, rounds)
    start = session.restored(phase, trainer.parts)
    with Bar(phase, steps, start, shown=session.accelerator.is_main_process) as bar:
        for step, batches in _steps(session, phase, start, steps):
            if rounds and rounds.begin_if_due(step):
                bar.line(training_line(session.log[-1]))
            loss = trainer.step(step, batches)
            bar.advance()
            done = step + 1
            if session.is_due(session.recipe.eval.interval, done) or done == steps:
                trainer.evaluate(done, loss)
                bar.line(training_line(session.log[-1]))
            if session.is_due(session.recipe.eval.checkpoint, done) and done < steps:
                trainer.check(done, loss)  # no state to go on from
                session.write(phase, done, trainer.parts)
        if rounds:
            rounds.end(steps)
            bar.line(training_line(session.log[-1]))
    if trainer.average:
        model.load_state_dict(trainer.average.module.state_dict())
    session.accelerator.free_memory()


def _steps(session: Session, phase: str, start: int, steps: int) -> Iterator[tuple[int, list[Batch]]]:
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


class _Trainer:
    """A network with all that a phase needs to train it.

    Attributes:
        average: The moving average of the weights, where the recipe asks for one.
        parts: What a checkpoint holds.
    """

    def __init__(
        self, session: Session, phase: str, settings: Training, model: nn.Module, teacher: nn.Module | None,
        rounds: Rounds | None,
    ) -> None:  # fmt: skip
        self.session, self.phase, self.settings, self.model, self.teacher = session, phase, settings, model, teacher
        self.split = rounds and rounds.split
        accelerator, data = session.accelerator, session.recipe.data
        steps = settings.epochs.steps(session.per_epoch)
        optimizer = create_optimizer_v2(
            model.to(accelerator.device), settings.optimizer, lr=settings.lr, momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        # A "step" that never decays is constant: older versions of timm have no other.
        shape = "step" if settings.scheduler == "constant" else settings.scheduler
        self.scheduler, _ = create_scheduler_v2(
            optimizer, shape, num_epochs=max(1, steps), min_lr=settings.min_lr,
            warmup_epochs=settings.warmup.steps(session.per_epoch, steps), warmup_lr=0.0,
            decay_rate=1.0, step_on_epochs=False, updates_per_epoch=1,  # a linear "poly"; an "epoch" is a step
        )  # fmt: skip
        self.distillation: Distillation | None = getattr(settings, "distillation", None)
        decay = getattr(settings, "ema", None)
        self.average = ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
        self.mixup: Mixup | None = None
        if data.mixup or data.cutmix:
            self.mixup = Mixup(  # type: ignore[no-untyped-call]
                data.mixup, data.cutmix, label_smoothing=data.smoothing, num_classes=session.classes
            )
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # statistics need the plain forward
        parts = {
            "model": model, "optimizer": self.optimizer, "scaler": accelerator.scaler,
            "average": self.average and self.average.module, "split": self.split,
        }  # fmt: skip
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def step(self, step: int, batches: list[Batch]) -> Tensor:
        """One step of the optimizer; the loss () of its batches, those of all processes."""
        accelerator = self.session.accelerator
        seed_all(self.session.recipe.seed, PHASES.index(self.phase), step, accelerator.process_index)
        self.scheduler.step_update(step)
        self.model.train()
        total = torch.zeros((), device=accelerator.device)
        for index, (images, labels) in enumerate(batches, 1):
            with nullcontext() if index == len(batches) else accelerator.no_sync(self.wrapped):
                loss = self._loss(self.session.placed(images), labels.to(accelerator.device)) / len(batches)
                accelerator.backward(loss)
            total += loss.detach()
        accelerator.unscale_gradients()
        if self.split:
            self.split.penalty_()
        if self.settings.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.model, step)
        mean: Tensor = accelerator.reduce(total, "mean")
        return mean

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of images (n, C, H, W) and classes (n,): cross-entropy, and how far the original network is."""
        smoothing = self.session.recipe.data.smoothing
        if self.mixup:
            images, labels = self.mixup(images.clone(), labels)  # in place; labels (n, classes), smoothed
            smoothing = 0.0
        with self.session.accelerator.autocast():
            outputs = self.wrapped(images)
        if not isinstance(outputs, Tensor):
            raise TrainingError(
                f"in training {type(self.model).__name__} gives {type(outputs).__name__}, not logits alone; switch "
                "further outputs off, such as by --set model.args.aux_logits=false."
            )
        logits = outputs.float()  # (n, classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if self.distillation is None or self.teacher is None:
            return loss
        with torch.no_grad(), self.session.accelerator.autocast():
            opinion = self.teacher(images).float()  # (n, classes)
        weight, temperature = self.distillation.weight, self.distillation.temperature
        told, known = (F.log_softmax(one / temperature, 1) for one in (logits, opinion))
        apart = F.kl_div(told, known, reduction="batchmean", log_target=True) * temperature**2
        return (1 - weight) * loss + weight * apart

    def check(self, done: int, loss: Tensor) -> None:
        """Go no further with a loss that is not finite."""
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is {float(loss)} after step {done} of {self.phase}; lower {self.phase}.lr, "
                f"now {self.settings.lr:g}."
            )

    def evaluate(self, done: int, loss: Tensor) -> None:
        """Note the accuracy after some steps."""
        self.check(done, loss)
        self.session.note({
            "phase": self.phase, "step": done, "epoch": done / self.session.per_epoch, "loss": float(loss),
            "lr": self.optimizer.param_groups[0]["lr"],
            "accuracy": accuracy(self.session, self.average.module if self.average else self.model),
        })  # fmt: skip


@torch.no_grad()
def accuracy(session: Session, model: nn.Module) -> float:
    """Share of the evaluation images that get their class; the model is in eval mode afterwards."""
    accelerator = session.accelerator
    model.to(accelerator.device)
    model.eval()
    session.share_buffers_(model)
    hits: list[Tensor] = []
    for images, labels in session.data.evaluation():
        with accelerator.autocast():
            right = model(session.placed(images)).argmax(1) == labels.to(accelerator.device)
        hits.append(accelerator.gather_for_metrics(right))
    if not hits:
        raise TrainingError("there are no images to measure accuracy on.")
    return float(torch.cat(hits).float().mean())


def training_line(record: dict[str, Any]) -> str:
    """One line of a training log: an evaluation, or a round of BC-ADL."""
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
