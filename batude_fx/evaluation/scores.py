"""How good and how fast networks are: their outputs on a folder of images, and milliseconds per image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from batude_fx.errors import UnsupportedError
from batude_fx.evaluation import image_folder
from batude_fx.graph.example_inputs import example_inputs
from batude_fx.support.model_state import eval_and_restore
from batude_fx.support.progress import track
from batude_fx.support.timing import time_networks

_TOP = 5
_NDIM = 2  # (N, classes)


@dataclass(frozen=True)
class Photos:
    """Images to evaluate on; made by `photos`.

    Attributes:
        folder: Where they are.
        paths: All of them.
    """

    folder: Path
    paths: Sequence[Path]

    @property
    def labelled(self) -> bool:
        """Whether each lies in a subfolder."""
        return image_folder.class_indices(self.paths, self.folder) is not None

    def labels(self, classes: int) -> list[int] | None:
        """The class of every image, where each lies in a subfolder; None where not all do.

        Raises:
            UnsupportedError: When there are not as many subfolders as classes.
        """
        found, folders = (
            image_folder.class_indices(self.paths, self.folder),
            len(image_folder.class_folders(self.folder)),
        )
        if found is not None and folders != classes:
            raise UnsupportedError(
                f"{self.folder} has {folders} class folders, the network has {classes} classes, so there is no "
                "accuracy; give one folder per class, in their order"
            )
        return found


def find_photos(folder: Path) -> Photos:
    """The images below a folder.

    Raises:
        CalibrationError: When the folder is missing or holds no image.
    """
    return Photos(folder, image_folder.image_paths(folder))


def logits(network: nn.Module, paths: Sequence[Path]) -> Tensor:
    """Outputs (N, classes) of a classifier on images, on the CPU.

    Raises:
        UnsupportedError: When the network gives anything else than one row per image.
        CalibrationError: When a file cannot be read, or the network takes no photos.
    """
    like = next(network.parameters())
    with eval_and_restore(network), torch.no_grad():
        batches = track(image_folder.batches(network, paths), "evaluating", math.ceil(len(paths) / image_folder.BATCH))
        outputs = [network(batch.to(like)) for batch in batches]
    if not isinstance(outputs[0], Tensor) or outputs[0].ndim != _NDIM:
        raise UnsupportedError(f"{type(network).__name__} is no classifier; it does not name one class per image.")
    return torch.cat(outputs).cpu()


def top1_and_top5(outputs: Tensor, truth: Sequence[int]) -> tuple[float, float]:
    """Shares of images whose class is the first, and among the first five, of the outputs (N, classes)."""
    hits = outputs.topk(min(_TOP, outputs.shape[1])).indices == torch.tensor(truth)[:, None]
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


def agreement(outputs: Tensor, others: Tensor) -> float:
    """Share of images for which two outputs (N, classes) name the same class."""
    return (outputs.argmax(1) == others.argmax(1)).float().mean().item()


def milliseconds(networks: Sequence[nn.Module], *, runs: int) -> list[float]:
    """Medians of the wall time of one image in each network, taken in turns.

    Args:
        networks: Of one architecture, on one device.
        runs: Timed ones, of each.
    """
    return [1000 * one for one in time_networks(networks, example_inputs(networks[0]), turns=runs)]
