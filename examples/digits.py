"""The digits of scikit-learn for the other examples: image folders, tensors, and a network trained on them.

Nothing is downloaded. 1347 images are for training and 450 are held out; they have 8 x 8 pixels and are resized to
32 x 32.
"""

from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch import Tensor, nn

SIDE = 32  # pixels; the digits have 8
TEST_IMAGES = 450


def write_digits(folder: Path) -> None:
    """Write `train/` and `validation/`, with one folder per class and the same share of every class in both."""
    pixels, classes = load_digits(return_X_y=True)
    train, held_out = train_test_split(range(len(pixels)), test_size=TEST_IMAGES, stratify=classes, random_state=0)
    for split, indices in (("train", train), ("validation", held_out)):
        for index in indices:
            class_folder = folder / split / str(classes[index])
            class_folder.mkdir(parents=True, exist_ok=True)
            gray = (pixels[index].reshape(8, 8) * 255 / 16).astype(np.uint8)
            Image.fromarray(gray).save(class_folder / f"{index:04}.png")


def read_digits(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 32, 32) in [-1, 1], as the recipe evaluates them, and classes (N,)."""
    digits = create_dataset("", root=str(folder), split=split, input_img_mode="L")
    loader = create_loader(
        digits, input_size=(1, SIDE, SIDE), batch_size=len(digits), use_prefetcher=False, num_workers=0,
        mean=(0.5,), std=(0.5,), crop_pct=0.95, interpolation="bilinear",
    )  # fmt: skip
    images, classes = next(iter(loader))
    return images, classes


def trained_network(images: Tensor, classes: Tensor, epochs: int = 5) -> nn.Module:
    """Return timm's smallest ResNet in eval mode, trained for about ten seconds."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    steps = epochs * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in track(range(epochs), "Training on digits"):
        for batch in torch.split(torch.randperm(len(images)), 64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), classes[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Return the share of the images that are classified correctly."""
    correct = network(images).argmax(1) == classes
    return int(correct.sum()) / len(correct)
