"""Hold back some of the images, evenly from all of them, for a measurement that they must not have influenced."""

import random
from collections.abc import Iterator

from torch import Tensor

_FEWEST = 8  # images; with fewer, nothing could be said


class HoldsBack:
    """Passes images on but for some, which are a uniform random sample of every n-th one, however many there are.

    Args:
        images: The images, one by one.
        every: One of this many images may be held back.
        most: Number of images that are held back at most.

    Attributes:
        held: The images that were held back, once all have passed: none, or at least 8.

    Source: algorithm R, as in `calibration.images.Reservoir`; an image that leaves the sample again passes on.
    """

    def __init__(self, images: Iterator[Tensor], *, every: int, most: int) -> None:
        self._images, self._every, self._most = images, every, most
        self.held: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the images that are not held back."""
        generator = random.Random(1)  # noqa: S311 - no secret depends on it
        candidates = 0
        for index, image in enumerate(self._images):
            passed = image
            if index % self._every == self._every - 1:
                slot = generator.randrange(candidates + 1)
                candidates += 1
                if len(self.held) < self._most:
                    self.held.append(image)
                    continue
                if slot < self._most:
                    passed, self.held[slot] = self.held[slot], image
            yield passed
        if len(self.held) < _FEWEST:
            yield from self.held
            self.held = []
