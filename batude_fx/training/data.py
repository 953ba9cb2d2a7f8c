"""Batches for training and evaluation.

timm builds the datasets, transforms and loaders; accelerate distributes the batches over the processes. The
augmentation of an image depends only on the seed, the epoch and the index of the image, so that batches are the same
for any number of processes and after a run was resumed.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from timm.data.config import resolve_data_config
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import Compose, RandomCrop

from batude_fx.errors import TrainingError, first_line, last_line
from batude_fx.evaluation.image_folder import read_image
from batude_fx.training.interruption import outlive_first_signals
from batude_fx.training.recipe import DataSection, Recipe

Batch = tuple[Tensor, Tensor]
"""Images (n, C, H, W) and their classes (n,); of a batch of all processes, the part of this process."""


@dataclass(frozen=True)
class Data:
    """The images of a run. Make one of these for images that timm's datasets cannot read.

    Attributes:
        train: Function of the epoch and the number of batches to skip; returns the remaining batches of that epoch,
            the same ones whenever it is called.
        evaluation: Function that returns the batches on which accuracy is measured.
        batches: Number of batches in an epoch of training.
    """

    train: Callable[[int, int], Iterator[Batch]]
    evaluation: Callable[[], Iterator[Batch]]
    batches: int


def image_data(recipe: Recipe, model: nn.Module, size: tuple[int, ...], classes: int, accelerator: Accelerator) -> Data:
    """Return the images that the recipe's `data` section names.

    Args:
        recipe: The recipe.
        model: The network, whose config says how images are normalized.
        size: (C, H, W) of an image.
        classes: Number of outputs of the network.
        accelerator: Distributes the batches over the processes.

    Raises:
        TrainingError: When there is no such dataset, it has too few images for a batch or other classes than the model,
            batches cannot be split for the processes, or timm refuses the augmentation.
        RecipeError: When a batch-norm would get batches of one image.
    """
    section = recipe.data
    config: dict[str, Any] = resolve_data_config({"input_size": size}, model=model)  # type: ignore[no-untyped-call]
    train = _SeededDataset(_dataset(recipe, section.train_split, config), recipe.seed)
    held_out = _dataset(recipe, section.val_split, config)
    _check_batches(recipe, train, accelerator.num_processes)
    _check_batch_norm(recipe, model, accelerator.num_processes)
    if section.labels:
        _check_classes(recipe, train.dataset, held_out, classes)
    if section.pad:
        _check_size(train, size)
    if section.labels and not section.name:  # timm would number the class folders of each split separately
        held_out = _dataset(recipe, section.val_split, config, _class_numbers(train.dataset))
    common: dict[str, Any] = {
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
        "num_workers": section.workers, "use_prefetcher": False, "persistent_workers": False,
        "pin_memory": accelerator.device.type == "cuda",
    }  # fmt: skip
    loader = _training_loader(section, train, common)
    if section.pad:
        train.transform = Compose([RandomCrop(size[1:], padding=section.pad), train.transform])
    evaluation = create_loader(cast("Any", held_out), batch_size=recipe.eval.batch_size, is_training=False, **common)
    for batches_of_split in (loader, evaluation):
        batches_of_split.worker_init_fn = partial(_start_worker, batches_of_split.worker_init_fn)
    train_batches: Any = accelerator.prepare_data_loader(loader)
    # Without labels, every process measures the distance from the original on all images, and keeps the same network.
    evaluation_batches: Any = accelerator.prepare_data_loader(evaluation) if section.labels else evaluation

    def batches(epoch: int, skip: int) -> Iterator[Batch]:
        train_batches.set_epoch(epoch)
        train.epoch = epoch
        for batch in skip_first_batches(train_batches, skip) if skip else train_batches:
            yield batch
            train.epoch = epoch  # the consumer of the batch may have begun another epoch meanwhile

    return Data(train=batches, evaluation=lambda: iter(evaluation_batches), batches=len(train_batches))


def _start_worker(initialize: Callable[[int], None], index: int) -> None:
    outlive_first_signals()
    initialize(index)


def _training_loader(section: DataSection, train: "_SeededDataset", common: Mapping[str, Any]) -> Any:  # noqa: ANN401 - timm's loaders have several types
    """Return timm's loader with the augmentation of the recipe; it sets the transform of the dataset.

    Raises:
        TrainingError: When timm does not understand `auto_augment`.
    """
    augmentation: dict[str, Any] = {
        "scale": (1.0, 1.0) if section.pad else section.scale, "ratio": (1.0, 1.0) if section.pad else section.ratio,
        "hflip": section.hflip, "color_jitter": section.color_jitter, "auto_augment": section.auto_augment,
        "re_prob": section.erase, "re_mode": "pixel",
    }  # fmt: skip
    part = section.batch_size // section.accumulate
    source: Any = train.dataset if isinstance(train.dataset, IterableDataset) else train
    try:
        return create_loader(source, batch_size=part, is_training=True, **augmentation, **common)
    except (AssertionError, ValueError, KeyError) as error:
        if section.auto_augment is None:
            raise
        raise TrainingError(
            f"timm does not understand the augmentation, data.auto_augment={section.auto_augment!r}: "
            f'{type(error).__name__} {error}. Write it as timm does, such as "rand-m9-mstd0.5".'
        ) from error


def check_first(data: Data, size: tuple[int, ...], classes: int | None, accumulate: int) -> None:
    """Check the first batch before anything is trained.

    Args:
        data: The images.
        size: (C, H, W) of an image that the network takes.
        classes: Number of outputs of the network; None where there are no labels.
        accumulate: Batches per optimizer step.

    Raises:
        TrainingError: When the batch cannot be read or does not fit the network, or an epoch has too few batches.
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
        expected = ", ".join(map(str, ("n", *size)))
        raise TrainingError(f"training images are {tuple(images.shape)}, the network takes ({expected}).")
    if classes is None:
        return
    if labels.ndim != 1 or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise TrainingError(f"labels must be one class per image, 0 to {classes - 1}; the first ones are {labels[:8]}.")


def _dataset(
    recipe: Recipe, split: str, config: dict[str, Any], class_map: dict[str, int] | None = None
) -> Dataset[Batch]:
    """Return the dataset of a split, without a transform.

    Args:
        recipe: The recipe.
        split: Name of the split.
        config: timm's data config of the model.
        class_map: Class folder to class number; by default timm numbers the folders in alphabetical order.

    Raises:
        TrainingError: When there is no such dataset or split.
    """
    section = recipe.data
    training = split == section.train_split
    if not section.name and not (section.root and section.root.exists()):
        problem = "is not given" if section.root is None else f"{str(section.root)!r} does not exist"
        raise TrainingError(
            f"data.root {problem}; give a folder with {section.train_split!r} and "
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
            "subfolder per class, or the name of a dataset in timm."
        ) from error
    if not section.name and Path(getattr(getattr(dataset, "reader", None), "root", "")) == section.root:
        # Without a folder of this name timm reads the whole of data.root, so that all images would be in this split.
        content = "with a subfolder per class" if section.labels else "with images in it"
        raise TrainingError(
            f"{section.root} has no folder {split!r}; give one, {content}, or name another by "
            f"data.{'train' if training else 'val'}_split."
        )
    if isinstance(reader := getattr(dataset, "reader", None), ReaderImageFolder):
        return _FolderImages(reader, cast("str", dataset.input_img_mode))
    return cast("Dataset[Batch]", dataset)


class _FolderImages(Dataset[Batch]):
    """The images of a folder as timm lists them, read as `evaluate` reads them.

    timm's own dataset takes the next image for one that cannot be read, so that accuracy would silently be that of
    other images; and it lets a file's content choose its decoder.
    """

    def __init__(self, reader: ReaderImageFolder, mode: str) -> None:
        self.reader, self.mode = reader, mode
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.reader.samples)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401 - a picture until timm has set the transform
        path, label = self.reader.samples[index]
        image = read_image(Path(path), self.mode)
        return (self.transform(image) if self.transform else image), label


def _check_batches(recipe: Recipe, train: "_SeededDataset", processes: int) -> None:
    """Refuse batch sizes that cannot be split for the processes and for gradient accumulation.

    Raises:
        TrainingError: Also when there are fewer images than a batch needs.
    """
    section, parts = recipe.data, recipe.data.accumulate * processes
    if processes > 1 and isinstance(train.dataset, IterableDataset):  # timm and accelerate would both split it
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


def _check_batch_norm(recipe: Recipe, model: nn.Module, processes: int) -> None:
    """Refuse batches of one image for a network with batch-norms, which normalize by the statistics of a batch.

    Raises:
        RecipeError: When it has one.
    """
    section = recipe.data
    names = (name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))  # noqa: SLF001
    if section.batch_size == section.accumulate * processes and (name := next(names, None)) is not None:
        raise recipe.problem(
            "data.batch_size",
            f"{section.batch_size} in {section.accumulate} parts for {processes} processes leaves 1 image in each, and "
            f"the batch-norm {name} needs several; use at least {2 * section.batch_size}",
        )


def _check_classes(recipe: Recipe, train: Dataset[Batch], held_out: Dataset[Batch], classes: int) -> None:
    """Refuse a dataset whose classes differ from those of the network, or between its splits.

    Raises:
        TrainingError: When they do.
    """
    section = recipe.data
    train_classes, held_out_classes = _class_numbers(train), _class_numbers(held_out)
    count = len(set(train_classes.values()))  # ImageNet has several names for a class
    if train_classes and count != classes:
        raise TrainingError(
            f"{section.root or section.name} has {count} classes, {recipe.model.name} has {classes} outputs; use "
            f"--set model.args.num_classes={count}, and --set pretrain.epochs=10 because a new head is untrained."
        )
    if unknown := sorted(held_out_classes.keys() - train_classes.keys()):
        raise TrainingError(
            f"{section.root or section.name} has classes in {section.val_split!r} that {section.train_split!r} lacks: "
            f"{', '.join(map(repr, unknown))}. Images belong in subfolders of the same names in both."
        )
    if held_out_classes and (missing := sorted(train_classes.keys() - held_out_classes.keys())):
        raise TrainingError(
            f"{section.root or section.name} has classes in {section.train_split!r} that {section.val_split!r} lacks: "
            f"{', '.join(map(repr, missing[:8]))}. The accuracy would be that of the others; give images of each class."
        )


def _check_size(train: "_SeededDataset", size: tuple[int, ...]) -> None:
    """Refuse images whose size is not the one that the network takes; only the first image is checked."""
    if not isinstance(train.dataset, IterableDataset):
        width, height = cast("Any", train.dataset[0][0]).size  # no transform yet, so it is a PIL image
        if (height, width) != size[1:]:
            raise TrainingError(
                f"data.pad is for images of the network's size, {size[1]} x {size[2]}, the first one has {height} x "
                f"{width} pixels; leave it out, or give the size by data.image_size."
            )


def _class_numbers(dataset: Dataset[Batch]) -> dict[str, int]:
    """Return class name to class number of a dataset of timm or torchvision; empty if the dataset has no names."""
    reader = getattr(dataset, "reader", dataset)
    return getattr(reader, "class_to_idx", None) or {}


class _SeededDataset(Dataset[Batch]):
    """A dataset whose random transforms depend on seed, epoch and index only, not on the process that computes them."""

    def __init__(self, dataset: Dataset[Batch], seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    @property
    def transform(self) -> Callable[..., Any]:
        """The transform of the dataset; timm's loader sets it."""
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
    """Seed all global random generators of the CPU with some numbers; restore their states afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - transforms draw from it
    seed_all(*numbers)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def seed_all(*numbers: int) -> None:
    """Seed all global random generators, that of the device included, with some numbers."""
    seed = zlib.crc32(repr(numbers).encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - mixup draws from it
    torch.manual_seed(seed)


def first_images(data: Data, count: int, accelerator: Accelerator) -> Tensor:
    """Return the first training images of epoch 0, on which statistics are measured; the same in every process.

    Returns:
        (count, C, H, W), or fewer where an epoch has no more.
    """
    batches: list[Tensor] = []
    for images, _ in data.train(0, 0):
        batches.append(accelerator.gather(images.to(accelerator.device)))
        if sum(map(len, batches)) >= count:
            break
    return torch.cat(batches)[:count]
