"""Batches that are held back are a uniform sample, the others all pass, and no batch is lost."""

from collections import Counter

import hypothesis.strategies as st
import torch
from hypothesis import given

from batude_fx.quality.held_back import HoldsBack
from batude_fx.support.inputs import Inputs


def _batches(count: int) -> list[Inputs]:
    return [Inputs((torch.tensor([index]),)) for index in range(count)]


@given(count=st.integers(0, 100), every=st.integers(1, 7), most=st.integers(1, 9))
def test_every_batch_passes_or_is_held_back(count: int, every: int, most: int) -> None:
    batches = _batches(count)
    source = HoldsBack(iter(batches), every=every, most=most)
    passed = list(source)
    assert len(source.held) == min(most, count // every)
    assert Counter(map(id, [*passed, *source.held])) == Counter(map(id, batches))


def test_late_batches_are_as_likely_as_early_ones() -> None:
    source = HoldsBack(iter(_batches(10_000)), every=5, most=200)
    list(source)
    held = torch.tensor([batch.tensors()[0].item() for batch in source.held])
    assert (held % 5 == 4).all()
    quarters = torch.histc(held.float(), 4, 0, 10_000)
    assert (quarters - 50).abs().max() < 25  # four standard deviations
