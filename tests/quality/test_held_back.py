"""Images that are held back are a uniform sample, the others all pass, and no image is lost."""

from collections import Counter

import hypothesis.strategies as st
import torch
from hypothesis import given
from torch import Tensor

from batude_fx.quality.held_back import HoldsBack


def _images(count: int) -> list[Tensor]:
    return [torch.tensor(index) for index in range(count)]


@given(count=st.integers(0, 200), every=st.integers(1, 7), most=st.integers(1, 30))
def test_every_image_passes_or_is_held_back(count: int, every: int, most: int) -> None:
    images = _images(count)
    source = HoldsBack(iter(images), every=every, most=most)
    passed = list(source)
    held = min(most, count // every)
    assert len(source.held) == (held if held >= 8 else 0)
    assert Counter(map(id, [*passed, *source.held])) == Counter(map(id, images))


def test_late_images_are_as_likely_as_early_ones() -> None:
    source = HoldsBack(iter(_images(10_000)), every=5, most=200)
    list(source)
    held = torch.stack(source.held)
    assert (held % 5 == 4).all()
    quarters = torch.histc(held.float(), 4, 0, 10_000)
    assert (quarters - 50).abs().max() < 25  # four standard deviations
