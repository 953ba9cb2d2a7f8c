"""Hold back some of the images, evenly from all of them, for a measurement that they must not have influenced."""

import random
from collections.abc import Iterator

from batude_fx.support.inputs import Inputs


class HoldsBack:
    """Passes batches on but for some, which are a uniform random sample of every n-th one, however many there are.

    Args:
        batches: Arguments of a network, a batch each.
        every: One of this many batches may be held back.
        most: Number of batches that are held back at most.

    Attributes:
        held: The batches that were held back, once all have passed.

    Source: algorithm R, as in `calibration.images.BatchReservoir`; a batch that is displaced from the sample passes on.
    """

    def __init__(self, batches: Iterator[Inputs], *, every: int, most: int) -> None:
        self._batches, self._every, self._most = batches, every, most
        self.held: list[Inputs] = []

    def __iter__(self) -> Iterator[Inputs]:
        """Yield the batches that are not held back."""
        generator = random.Random(1)  # noqa: S311 - no secret depends on it
        candidates = 0
        for index, batch in enumerate(self._batches):
            passed = batch
            if index % self._every == self._every - 1:
                slot = generator.randrange(candidates + 1)
                candidates += 1
                if len(self.held) < self._most:
                    self.held.append(batch)
                    continue
                if slot < self._most:
                    passed, self.held[slot] = self.held[slot], batch
            yield passed
