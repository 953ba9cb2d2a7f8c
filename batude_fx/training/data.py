"""Batches for training and evaluation, the same ones whatever the number of processes and whenever a run was killed.

timm makes the datasets, their transforms and loaders; accelerate deals their batches out to the processes. What is
random about an image depends on the seed, the epoch and its place in the dataset alone.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from timm.data.config import resolve_data_config
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import Compose, RandomCrop

from batude_fx.errors import TrainingError, first_line, last_line
from batude_fx.training.recipe import Recipe

Batch = tuple[Tensor, Tensor]
"""Images (n, C, H, W) and classes (n,), the share of one process."""


@dataclass(frozen=True)
class Data:
    """The images of a run; whoever has them elsewhere than timm finds them makes one of these.

    Attributes:
        train: Epoch and number of batches to skip, to the batches of that epoch: the same ones each time it is asked.
        evaluation: To the batches that accuracy is measured on.
        batches: In an epoch of training.
    """

    train: Callable[[int, int], Iterator[Batch]]
    evaluation: Callable[[], Iterator[Batch]]
    batches: int


def image_data(recipe: Recipe, model: nn.Module, size: tuple[int, ...], classes: int, accelerator: Accelerator) -> Data:
    """What the recipe's `data` section asks for.

    Args:
        recipe: The recipe.
        model: Says how images are normalized.
        size: Of an image, (C, H, W).
        classes: That the model tells apart.
        accelerator: Deals the batches out.

    Raises:
        TrainingError: When there is no such dataset, it has too few images for a batch or other classes than the model,
            batches cannot be split for the processes, or timm refuses the augmentation.
    """
    section = recipe.data
    config: dict[str, Any] = resolve_data_config({"input_size": size}, model=model)  # type: ignore[no-untyped-call]
    train = _Seeded(_dataset(recipe, section.train_split, config), recipe.seed)
    share, parts = section.batch_size // section.accumulate, section.accumulate * accelerator.num_processes
    held_out = _dataset(recipe, section.val_split, config)
    _check(recipe, train, held_out, parts, classes)
    if section.pad:
        _check_size(train, size)
    if not section.name:  # timm numbers the subfolders of each split by themselves
        held_out = _dataset(recipe, section.val_split, config, _classes(train.dataset))
    augmentation: dict[str, Any] = {
        "scale": (1.0, 1.0) if section.pad else section.scale, "ratio": (1.0, 1.0) if section.pad else section.ratio,
        "hflip": section.hflip, "color_jitter": section.color_jitter, "auto_augment": section.auto_augment,
        "re_prob": section.erase, "re_mode": "pixel",
    }  # fmt: skip
    common: dict[str, Any] = {
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
        "num_workers": section.workers, "use_prefetcher": False, "persistent_workers": False,
        "pin_memory": accelerator.device.type == "cuda",
    }  # fmt: skip
    source = train.dataset if isinstance(train.dataset, IterableDataset) else train
    try:
        loader = create_loader(cast("Any", source), batch_size=share, is_training=True, **augmentation, **common)
    except (AssertionError, ValueError, KeyError) as error:
        if section.auto_augment is None:
            raise
        raise TrainingError(
            f"timm does not understand the augmentation, data.auto_augment={section.auto_augment!r}: "
            f'{type(error).__name__} {error}. Write it as timm does, such as "rand-m9-mstd0.5".'
        ) from error
    if section.pad:
        train.transform = Compose([RandomCrop(size[1:], padding=section.pad), train.transform])
    evaluation = create_loader(cast("Any", held_out), batch_size=recipe.eval.batch_size, is_training=False, **common)
    prepared: Any = accelerator.prepare_data_loader(loader)
    shown: Any = accelerator.prepare_data_loader(evaluation)

    def batches(epoch: int, skip: int) -> Iterator[Batch]:
        prepared.set_epoch(epoch)
        train.epoch = epoch
        for batch in skip_first_batches(prepared, skip) if skip else prepared:
            yield batch
            train.epoch = epoch  # whoever got the batch may have begun another epoch meanwhile

    return Data(train=batches, evaluation=lambda: iter(shown), batches=len(prepared))


def check_first(data: Data, size: tuple[int, ...], classes: int, accumulate: int) -> None:
    """Look at the first batch before anything is trained.

    Args:
        data: What will be trained on.
        size: Of an image that the network takes, (C, H, W).
        classes: That it tells apart.
        accumulate: Batches in a step.

    Raises:
        TrainingError: When it cannot be read or is for another network, or an epoch has too few.
    """
    if data.batches < accumulate:
        raise TrainingError(f"an epoch has {data.batches} batches, a step takes {accumulate}; lower data.accumulate.")
    try:
        images, labels = next(data.train(0, 0))
    except StopIteration:
        raise TrainingError(f"there are no images to train on, though {data.batches} batches are promised.") from None
    except Exception as error:  # whatever the dataset and its transforms raise
        raise TrainingError(f"the first training images cannot be read: {last_line(error)}.") from error
    if not len(images) or tuple(images.shape[1:]) != tuple(size):
        wanted = ", ".join(map(str, ("n", *size)))
        raise TrainingError(f"training images are {tuple(images.shape)}, the network takes ({wanted}).")
    if labels.ndim != 1 or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise TrainingError(f"labels must be one class per image, 0 to {classes - 1}; the first ones are {labels[:8]}.")


def _dataset(
    recipe: Recipe, split: str, config: dict[str, Any], class_map: dict[str, int] | None = None
) -> Dataset[Batch]:
    section = recipe.data
    training = split == section.train_split
    if not section.name and not (section.root and section.root.exists()):
        found = "is not given" if section.root is None else f"{str(section.root)!r} does not exist"
        raise TrainingError(
            f"data.root {found}; give a folder with {section.train_split!r} and "
            f"{section.val_split!r} in it, each with a subfolder per class."
        )
    try:
        dataset = create_dataset(
            section.name, root=str(section.root) if section.root else None, split=split, is_training=training,
            class_map=cast("Any", class_map), download=section.download, batch_size=section.batch_size,
            seed=recipe.seed, input_img_mode="L" if config["input_size"][0] == 1 else "RGB",
        )  # fmt: skip
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise TrainingError(
            f"data.name {section.name!r} at data.root {str(section.root)!r} has no split {split!r} that can be read: "
            f"{reason}. Give a folder with {section.train_split!r} and {section.val_split!r} in it, each with a "
            "subfolder per class, or a dataset name of timm's."
        ) from error
    if not section.name and Path(getattr(getattr(dataset, "reader", None), "root", "")) == section.root:
        # timm takes the folder itself where it finds no split: all images would be in this one.
        raise TrainingError(
            f"{section.root} has no folder {split!r}; give one, with a subfolder per class, or say which it is by "
            f"data.{'train' if training else 'val'}_split."
        )
    return cast("Dataset[Batch]", dataset)


def _check(recipe: Recipe, train: "_Seeded", held_out: Dataset[Batch], parts: int, classes: int) -> None:
    """Say what can be said before anything is trained, of batches that are computed in so many parts."""
    section, processes = recipe.data, parts // recipe.data.accumulate
    if processes > 1 and isinstance(train.dataset, IterableDataset):  # timm deals it out, and accelerate once more
        raise TrainingError(f"{section.name} is a stream, which only one process can read; this run has {processes}.")
    if recipe.eval.batch_size % processes:
        raise TrainingError(
            f"eval.batch_size {recipe.eval.batch_size} cannot be split for {processes} processes; use a multiple."
        )
    if section.batch_size % parts:
        raise TrainingError(
            f"data.batch_size {section.batch_size} cannot be split into {section.accumulate} parts for "
            f"{processes} processes; use a multiple of {parts}."
        )
    if not isinstance(train.dataset, IterableDataset) and len(train) < section.batch_size:
        raise TrainingError(
            f"{section.root or section.name} has {len(train)} images to train on, a batch takes {section.batch_size}; "
            "use a smaller data.batch_size."
        )
    if (section.mixup or section.cutmix) and section.batch_size // parts % 2:
        raise TrainingError(
            f"mixup and cutmix mix pairs, and data.batch_size {section.batch_size} in {parts} parts leaves "
            f"{section.batch_size // parts} images in each; use a multiple of {2 * parts}."
        )
    named, others = _classes(train.dataset), _classes(held_out)
    found = len(set(named.values()))  # ImageNet has several names for a class
    if named and found != classes:
        raise TrainingError(
            f"{section.root or section.name} has {found} classes, {recipe.model.name} tells {classes} apart; "
            f"use --set model.args.num_classes={found}, and --set pretrain.epochs=10 as a fresh head is untrained."
        )
    if unknown := sorted(others.keys() - named.keys()):
        raise TrainingError(
            f"{section.root or section.name} has classes in {section.val_split!r} that {section.train_split!r} lacks: "
            f"{', '.join(map(repr, unknown))}. Images belong into subfolders of the same names in both."
        )


def _check_size(train: "_Seeded", size: tuple[int, ...]) -> None:
    """Where images are cropped as they are, look at the first one."""
    if not isinstance(train.dataset, IterableDataset):
        width, height = cast("Any", train.dataset[0][0]).size  # no transform turns it into a tensor yet
        if (height, width) != size[1:]:
            raise TrainingError(
                f"data.pad is for images of the network's size, {size[1]} x {size[2]}, the first one has {height} x "
                f"{width} pixels; leave it out, or give the size by data.image_size."
            )


def _classes(dataset: Dataset[Batch]) -> dict[str, int]:
    """Those that a dataset of timm or torchvision names, and their numbers; empty where it does not."""
    reader = getattr(dataset, "reader", dataset)
    return getattr(reader, "class_to_idx", None) or {}


class _Seeded(Dataset[Batch]):
    """A dataset whose random transforms depend on seed, epoch and index: not on the process that computes them."""

    def __init__(self, dataset: Dataset[Batch], seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    @property
    def transform(self) -> Callable[..., Any]:
        """timm sets it."""
        return self.dataset.transform  # type: ignore[attr-defined, no-any-return]

    @transform.setter
    def transform(self, transform: Callable[..., Any]) -> None:
        self.dataset.transform = transform  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Batch:
        with seeded(self.seed, self.epoch, index):
            return self.dataset[index]


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """All global random generators of the CPU start from these numbers, and are afterwards where they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - transforms draw from it
    seed_all(*numbers)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def seed_all(*numbers: int) -> None:
    """Start all global random generators, the device's too, from some numbers."""
    seed = zlib.crc32(repr(numbers).encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - mixup draws from it
    torch.manual_seed(seed)


def first_images(data: Data, count: int, accelerator: Accelerator) -> Tensor:
    """Training images of epoch 0, the same ones in every process: what statistics are measured on.

    Returns:
        (count, C, H, W), or fewer where an epoch has no more.
    """
    taken: list[Tensor] = []
    for images, _ in data.train(0, 0):
        taken.append(accelerator.gather(images.to(accelerator.device)))
        if sum(map(len, taken)) >= count:
            break
    return torch.cat(taken)[:count]
