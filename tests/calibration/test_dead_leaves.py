"""Images of dead leaves are reproducible and have the statistics of photographs."""

import torch

from batude_fx.calibration.dead_leaves import dead_leaves


def test_dead_leaves_are_reproducible_images() -> None:
    images = dead_leaves(3, (24, 32), seed=1)
    assert images.shape == (3, 3, 24, 32)
    assert torch.equal(images[:2], dead_leaves(2, (24, 32), seed=1))
    assert not torch.equal(images, dead_leaves(3, (24, 32), seed=2))
    assert 0 <= images.min() <= images.max() <= 1
    # Neighbouring pixels of photographs are alike, and so are their colour channels.
    flat = (images - images.mean((2, 3), keepdim=True)).flatten(0, 1)
    neighbours = torch.corrcoef(torch.stack([flat[..., 1:].flatten(), flat[..., :-1].flatten()]))[0, 1]
    colours = torch.corrcoef(images.transpose(0, 1).flatten(1))
    assert neighbours > 0.7
    assert colours.min() > 0.5
