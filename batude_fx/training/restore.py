"""Restore a compressed network without labels: its original teaches it, on the images that it was calibrated with.

A few hundred images would be learned by heart: a network of millions of parameters agrees with its teacher on them
after a hundred steps, and less than before on any other. So it is mostly gains and biases that move, one of each per
channel; weights the more slowly, the more of them there are, and those of large networks not at all. Images are seen in
random crops, and of all evaluations on the images held back the closest network is kept, which may be the one that it
started from.

Source of the training: see `teacher`. Of scales and shifts alone as what is trained: J. Frankle, D. Schwab, A. Morcos,
"Training BatchNorm and Only BatchNorm", ICLR 2021, https://arxiv.org/abs/2003.00152.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from operator import itemgetter
from typing import Literal, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

from batude_fx.budget.budget import Budget
from batude_fx.graph.flops import count_flops, count_params
from batude_fx.quality.comparison import QualityMeter
from batude_fx.quality.quality import Quality, Restoration
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import random_states_kept
from batude_fx.support.user_warning import warn_user
from batude_fx.training.data import Batch, Data, seeded
from batude_fx.training.duration import Duration
from batude_fx.training.phase import run_phase
from batude_fx.training.recipe import DataSection, Distillation, Eval, Finalize, ModelSection, OneShot, Recipe
from batude_fx.training.session import Session, own_accelerate_state
from batude_fx.training.teacher import Teacher

ModelT = TypeVar("ModelT", bound=nn.Module)
_TOTAL_FLOPS = 1e13  # of the teacher on all images that training looks at: about ten minutes on two cores
_FLOPS_PER_PIXEL = 20_000  # what an image costs beside the flops of its convolutions
_FEWEST, _MOST = 2_400, 25_600  # images that training looks at, the same ones again and again
_ENOUGH_LOOKS = 0.25  # per parameter of the original: with so many, weights move as fast as gains and biases
_TOO_FEW_LOOKS = 0.001  # with fewer, weights do not move
_SMALLEST_BATCH, _LARGEST_BATCH, _STEPS = 16, 64, 400
_EVALUATIONS = 10
_RATE = 1e-3  # of Adam
_SCALE = (0.5, 1.0)  # area of a random crop
_DISTILLATION = Distillation(weight=1.0, temperature=1.0, stages=1.0)


def restore(
    original: nn.Module, small: ModelT, images: Sequence[Tensor], inputs: Inputs, meter: QualityMeter, before: Quality
) -> tuple[ModelT, Restoration]:
    """Teach a compressed network by its original.

    Args:
        original: The network that was compressed; it is left as it is.
        small: The compressed network, which is trained in place.
        images: What it is taught with, without a batch axis.
        inputs: The example input, which is one tensor; images are cropped to its size.
        meter: Compares the networks, on images of which none may be in `images`.
        before: How close the compressed network is to its original on these.

    Returns:
        The network, with the device, flags and memory formats that it had, and how it was restored.

    Raises:
        TrainingError: When a step fails.

    Warns:
        UserWarning: When it was interrupted, or the loss was not finite; the network is the best so far.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with own_accelerate_state(), random_states_kept(devices), seeded(0), torch.enable_grad(), _as_it_was(small):
        recipe = _recipe(original, len(images), inputs)
        with Session(recipe, None, resume=False, restores=True) as session:
            target = session.accelerator.device
            teacher = Teacher(original, inputs, _DISTILLATION, classifies=before.agreement is not None)
            teacher.network.to(target)
            if recipe.model.channels_last:
                _to_channels_last_(teacher.network)
                _to_channels_last_(small)
            compared = [batch.map(lambda tensor: tensor.to(target)) for batch in meter.batches]
            session.meter = QualityMeter(teacher.network, compared, synthetic=before.synthetic)
            session.start(_views(images, inputs, recipe))
            done = run_phase(session, "finalize", recipe.finalize, small, teacher)
            steps = recipe.finalize.epochs.steps(session.steps_per_epoch)
    if done < steps:
        reason = "was stopped" if session.interruption.received else "ended, as the loss was not finite,"
        warn_user(f"restoring {reason} after {done} of {steps} steps; the network is the best of those.")
    measured = [record for record in session.log if record["distance"] is not None]
    kept = min(measured, key=itemgetter("distance"))["step"] if measured else 0
    return small, Restoration(before=before, images=len(images), steps=done, kept=kept)


@contextmanager
def _as_it_was(network: nn.Module) -> Iterator[None]:
    """Let all parameters of a network be trained in a block, on any device; then restore flags and memory formats."""
    device = next(network.parameters()).device
    parameters = [(parameter, parameter.stride(), parameter.requires_grad) for parameter in network.parameters()]
    training = {module: module.training for module in network.modules()}
    for parameter, *_ in parameters:
        parameter.requires_grad = parameter.is_floating_point()
    try:
        yield
    finally:
        network.to(device)
        for parameter, stride, needed_gradient in parameters:
            in_order = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=device)
            parameter.data = in_order.copy_(parameter.data)
            parameter.requires_grad, parameter.grad = needed_gradient, None
        for module, flag in training.items():
            module.training = flag


def _to_channels_last_(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim == 4:  # noqa: PLR2004 - (C_out, C_in, H, W)
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def _precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """Return bf16 where the device computes convolutions several times faster in it: with AMX, or on recent GPUs."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if device.type == "cpu" and has_amx() else "fp32"


def _recipe(original: nn.Module, images: int, inputs: Inputs) -> Recipe:
    """Return the settings, as a recipe that names neither the network nor the images."""
    device = PartialState().device
    pixels = prod(inputs.image.shape[2:]) if inputs.image is not None else 0
    looks = _TOTAL_FLOPS / (count_flops(original, inputs) + _FLOPS_PER_PIXEL * pixels + 1)
    looks = min(max(looks, _FEWEST), _MOST)
    batch = min(max(_SMALLEST_BATCH, int(looks / _STEPS)), _LARGEST_BATCH, images)
    steps = int(looks / batch)
    every = Duration(max(1, steps // _EVALUATIONS), "steps")
    return Recipe(
        model=ModelSection(
            name=type(original).__name__, channels_last=inputs.image is not None, precision=_precision(device)
        ),
        data=DataSection(labels=False, batch_size=batch, scale=_SCALE),
        budget=Budget(flops=0.5),
        one_shot=OneShot(epochs=0),
        finalize=Finalize(
            epochs=Duration(steps, "steps"), optimizer="adam", lr=_RATE, weight_decay=0.0, warmup=Duration(5, "%"),
            weights_lr=_RATE * _weights_share(looks / count_params(original)),
            distillation=_DISTILLATION, fixed_statistics=True,
        ),
        eval=Eval(interval=every, checkpoint=every),
    )  # fmt: skip


def _weights_share(looks_per_parameter: float) -> float:
    """Return how fast weights move, as a share of the rate of gains and biases.

    Measured: with 0.24 looks per parameter (ResNet-20 on CIFAR-10) all may move at one rate; with 0.002 (MobileNetV2 on
    256 photos) a tenth of it is better than nothing and than a third; with 0.0002 (ResNet-50) a fortieth is harmful.
    """
    return 0.0 if looks_per_parameter < _TOO_FEW_LOOKS else min(1.0, (looks_per_parameter / _ENOUGH_LOOKS) ** 0.5)


def _views(images: Sequence[Tensor], inputs: Inputs, recipe: Recipe) -> Data:
    """Return random crops of images, or other tensors as they are, in batches; every process gets the same."""
    section, example = recipe.data, inputs.image
    crop = Compose([
        RandomResizedCrop(example.shape[2:], scale=section.scale, ratio=section.ratio, antialias=True),
        RandomHorizontalFlip(section.hflip),
    ]) if example is not None else None  # fmt: skip

    def view(epoch: int, index: int) -> Tensor:
        with seeded(recipe.seed, epoch, index):
            return crop(images[index]) if crop else images[index]

    def batches(epoch: int, skip: int) -> Iterator[Batch]:
        with seeded(recipe.seed, epoch):
            order = torch.randperm(len(images)).tolist()
        count = section.batch_size
        for start in range(skip * count, len(images) - count + 1, count):
            batch = torch.stack([view(epoch, index) for index in order[start : start + count]])
            yield batch, torch.zeros(count, dtype=torch.long)

    return Data(train=batches, evaluation=lambda: iter(()), batches=len(images) // section.batch_size)
