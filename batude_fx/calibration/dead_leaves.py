"""Synthetic "dead leaves" images, generated from a seed, for calibration when the user has no images.

Opaque shapes of power-law sizes cover each other, each with its own colour, shading and texture. This gives the edges,
flat regions, occlusions, scale invariance and correlated colours of photographs, on which the covariances in a
convolutional network depend.

Source: A. Lee, D. Mumford, J. Huang, "Occlusion models for natural images", IJCV 41, 2001; M. Baradad et al.,
"Learning to See by Looking at Noise", NeurIPS 2021, https://arxiv.org/abs/2106.05963. Added here: shading and
texture inside each shape, shapes of several families, and a slight blur.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.floating[Any]]
LEAVES = 160  # shapes per image
_CHECKED = 0.3  # share of the gratings that are checkered, not striped
_SMALLEST, _LARGEST = 0.02, 0.6  # radii, as fractions of the image's shorter side
_REACH = 2.9  # no shape extends further than this many radii: the corner of a square, stretched by 2, is at 2 * 2**0.5


@dataclass(frozen=True)
class _Leaves:
    """The shapes of one image, from the back to the front; leaf 0 is the background.

    Attributes:
        middle: (leaves, 2) y and x of the centre, in units of the image's shorter side.
        axes: (leaves, 2, 2) maps a displacement from the centre to coordinates in which the leaf has radius 1.
        family: (leaves,) 0 for a diamond, 1 for an ellipse, 2 for a rectangle.
        colour: (leaves, 3) RGB.
        slope: (leaves, 2) gradient of the shading along both coordinates, per radius.
        texture: (leaves,) amplitude of the noise.
        stripes: (leaves,) amplitude of the grating.
        frequency: (leaves, 2) frequency of the grating along both coordinates, in radians per radius.
    """

    middle: Array
    axes: Array
    family: NDArray[np.int64]
    colour: Array
    slope: Array
    texture: Array
    stripes: Array
    frequency: Array


def dead_leaves(count: int, size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Generate colour images.

    Args:
        count: Number of images.
        size: Height and width in pixels.
        seed: The same seed gives the same images; the first images do not depend on `count`.

    Returns:
        (count, 3, height, width) float32 inside [0, 1].
    """
    images = np.stack([_image(size, np.random.default_rng((seed, index))) for index in range(count)])
    return torch.from_numpy(images)


def _image(size: tuple[int, int], rng: np.random.Generator) -> Array:
    """Generate one image (3, height, width) with values inside [0, 1]."""
    leaves = _draw_leaves(size, rng)
    y, x = (np.arange(extent, dtype=np.float32) / min(size) for extent in size)
    top = _top_leaf(leaves, y, x)  # (H, W)
    dy, dx = y[:, None] - leaves.middle[top, 0], x[None, :] - leaves.middle[top, 1]
    v, u = (leaves.axes[top, row, 0] * dy + leaves.axes[top, row, 1] * dx for row in (0, 1))
    light = leaves.slope[top, 0] * np.clip(u, -1, 1) + leaves.slope[top, 1] * np.clip(v, -1, 1)
    light += leaves.texture[top] * _noise(size, rng)
    light += leaves.stripes[top] * np.sin(leaves.frequency[top, 0] * u) * np.cos(leaves.frequency[top, 1] * v)
    image = _blurred(leaves.colour[top].transpose(2, 0, 1) + light)
    contrast = rng.uniform(0.7, 1.3)
    return cast("Array", np.clip((image - 0.5) * contrast + 0.5, 0, 1).astype(np.float32))


def _draw_leaves(size: tuple[int, int], rng: np.random.Generator) -> _Leaves:
    n = LEAVES
    radius = _radii(rng)
    angle, stretch = rng.uniform(0, np.pi, n), 2 ** rng.uniform(-1, 1, n)
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.stack([np.stack([cos * stretch, -sin * stretch], 1), np.stack([sin / stretch, cos / stretch], 1)], 1)
    # Photographs are mostly grey: the three colours share a grey level, shifted a little, mostly to warm or to cold.
    grey, warmth, tint = rng.uniform(0, 1, (n, 1)), rng.normal(0, 0.12, (n, 1)), rng.normal(0, 0.08, (n, 3))
    checks = rng.uniform(0, 1, n) < _CHECKED
    frequency = rng.uniform(3, 15, (n, 2)) * np.stack([np.ones(n), checks], 1)
    leaves = _Leaves(
        middle=_float(rng.uniform(0, 1, (n, 2)) * np.array(size) / min(size)),
        axes=_float(axes / radius[:, None, None]),
        family=rng.choice(np.array([0, 1, 1, 2]), n),
        colour=_float(grey + warmth * np.array([1.0, 0.0, -1.0]) + tint),
        slope=_float(rng.normal(0, 0.15, (n, 2))),
        texture=_float(0.3 * rng.uniform(0, 1, n) ** 3),
        stripes=_float(0.3 * rng.uniform(0, 1, n) ** 3),
        frequency=_float(frequency),
    )
    leaves.texture[0] = 0.25
    return leaves


def _radii(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the radii, roughly the largest first, so that small leaves lie in front and stay visible.

    A density proportional to r^-3 makes the image scale invariant: leaves of radii r to 2 r then have the same total
    area for every r. Such radii have a uniform r^-2.
    """
    power_law = (_LARGEST**-2 + rng.uniform(0, 1, LEAVES) * (_SMALLEST**-2 - _LARGEST**-2)) ** -0.5
    # Nearly all radii of a power law are tiny, so half of the leaves get radii that are uniform in the logarithm.
    log_uniform = _SMALLEST * (_LARGEST / _SMALLEST) ** rng.uniform(0, 1, LEAVES)
    radius = np.where(rng.permutation(LEAVES) % 2, power_law, log_uniform)
    return radius[np.argsort(-radius - 0.15 * rng.uniform(0, 1, LEAVES))]


def _top_leaf(leaves: _Leaves, y: Array, x: Array) -> NDArray[np.int64]:
    """Return (H, W), the index of the leaf that is visible at each pixel."""
    top = np.zeros((len(y), len(x)), np.int64)
    reach = _REACH / np.sqrt(np.abs(np.linalg.det(leaves.axes)))
    for leaf in range(1, LEAVES):
        middle_y, middle_x = leaves.middle[leaf]
        rows = slice(*np.searchsorted(y, (middle_y - reach[leaf], middle_y + reach[leaf])))
        columns = slice(*np.searchsorted(x, (middle_x - reach[leaf], middle_x + reach[leaf])))
        dy, dx = (y[rows] - middle_y)[:, None], (x[columns] - middle_x)[None, :]
        v, u = (np.abs(a * dy + b * dx) for a, b in leaves.axes[leaf])
        family = leaves.family[leaf]
        distance = u + v if family == 0 else u * u + v * v if family == 1 else np.maximum(u, v)
        top[rows, columns][distance < 1] = leaf
    return top


def _noise(size: tuple[int, int], rng: np.random.Generator) -> Array:
    """Generate noise (H, W) with an amplitude spectrum of 1 / f and unit variance."""
    spectrum = np.fft.rfft2(rng.normal(size=size))
    fy, fx = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])
    noise = np.fft.irfft2(spectrum / np.sqrt(fy**2 + fx**2 + 1 / (size[0] * size[1])), s=size)
    return _float(noise / noise.std())


def _blurred(image: Array) -> Array:
    """Blur with a 3 x 3 binomial kernel, as the edges in photographs are never perfectly sharp."""
    for axis in (1, 2):
        padded = np.pad(image, [(int(a == axis), int(a == axis)) for a in range(3)], mode="edge")
        middle, last = range(1, padded.shape[axis] - 1), range(2, padded.shape[axis])
        image = 0.25 * (padded.take(range(image.shape[axis]), axis) + padded.take(last, axis)) + 0.5 * padded.take(
            middle, axis
        )
    return image


def _float(values: NDArray[np.float64]) -> Array:
    return values.astype(np.float32)
