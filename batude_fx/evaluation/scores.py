"""Accuracy, agreement and speed of classifiers, on a folder of images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from batude_fx.errors import UnsupportedError
from batude_fx.evaluation import image_folder
from batude_fx.graph.example_inputs import example_inputs
from batude_fx.support.model_state import private_copy
from batude_fx.support.progress import track
from batude_fx.support.timing import time_networks

_TOP = 5
_NDIM = 2  # (N, classes)


@dataclass(frozen=True)
class Photos:
    """Images to evaluate on, made by `find_photos`.

    Attributes:
        folder: The folder that contains them.
        paths: The path of every image.
    """

    folder: Path
    paths: Sequence[Path]

    @property
    def labelled(self) -> bool:
        """Whether every image is in a subfolder, which gives its class."""
        return image_folder.class_indices(self.paths, self.folder) is not None

    def labels(self, classes: int) -> list[int] | None:
        """Return the class index of every image, or None if any image is in no subfolder.

        Raises:
            UnsupportedError: When there are not as many subfolders as classes.
        """
        labels = image_folder.class_indices(self.paths, self.folder)
        folders = len(image_folder.class_folders(self.folder))
        if labels is not None and folders != classes:
            raise UnsupportedError(
                f"{self.folder} has {folders} class folders, the network has {classes} classes, so there is no "
                "accuracy; give one folder per class, in the order of the classes"
            )
        return labels


def find_photos(folder: Path) -> Photos:
    """Find the images in a folder and its subfolders.

    Raises:
        CalibrationError: When the folder is missing or holds no image.
    """
    return Photos(folder, image_folder.image_paths(folder))


def logits(network: nn.Module, paths: Sequence[Path]) -> Tensor:
    """Return the outputs (N, classes) of a classifier on images, on the CPU.

    Raises:
        UnsupportedError: When the network's output is anything but one row per image.
        CalibrationError: When a file cannot be read as an image, or the network does not take one colour image.
    """
    like = next(network.parameters())
    with private_copy(network) as copied, torch.no_grad():
        batches = track(image_folder.batches(network, paths), "evaluating", math.ceil(len(paths) / image_folder.BATCH))
        outputs = [copied(batch.to(like)) for batch in batches]
    if not isinstance(outputs[0], Tensor) or outputs[0].ndim != _NDIM:
        raise UnsupportedError(
            f"{type(network).__name__} is no classifier: it does not give one row of scores per image."
        )
    return torch.cat(outputs).cpu()


def top1_and_top5(outputs: Tensor, truth: Sequence[int]) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy: the shares of images whose class has the largest, and a top-5, output.

    Args:
        outputs: (N, classes).
        truth: Class index of every image.
    """
    hits = outputs.topk(min(_TOP, outputs.shape[1])).indices == torch.tensor(truth)[:, None]
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


def agreement(outputs: Tensor, others: Tensor) -> float:
    """Return the share of images for which two networks' outputs (N, classes) are largest at the same class."""
    return (outputs.argmax(1) == others.argmax(1)).float().mean().item()


def milliseconds(networks: Sequence[nn.Module], *, runs: int) -> list[float]:
    """Return the median wall time of one image in each network, in milliseconds; the networks run in turns.

    Args:
        networks: Networks of one architecture, on one device.
        runs: Number of timed runs of each network.
    """
    return [1000 * seconds for seconds in time_networks(networks, example_inputs(networks[0]), turns=runs)]
