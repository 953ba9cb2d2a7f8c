"""Checkpoints keep all state there is, of every optimizer."""

from pathlib import Path

import pytest
import torch
from timm.optim._optim_factory import create_optimizer_v2
from torch import nn

from batude_fx import TrainingError
from batude_fx.training.checkpoint_file import read, write
from batude_fx.training.recipe import _optimizers


def test_checkpoints_keep_whatever_state_there_is(tmp_path: Path) -> None:
    tree = {"a": {"0": torch.arange(3), 1: [1, 2.5, None, "x"]}, "empty": {}, "b": torch.zeros(0)}
    write(tmp_path / "one", tree)
    back = read(tmp_path / "one")
    assert torch.equal(back["a"]["0"], torch.arange(3))
    assert back["a"][1] == [1, 2.5, None, "x"]
    assert back["empty"] == {}
    (tmp_path / "one").write_bytes((tmp_path / "one").read_bytes()[:-4])
    with pytest.raises(TrainingError, match="is broken"):
        read(tmp_path / "one")
    with pytest.raises(TrainingError, match="does not exist"):
        read(tmp_path / "two")


@pytest.mark.parametrize("name", list(_optimizers()))
def test_every_optimizer_of_recipes_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8)

    def started() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
        return model, create_optimizer_v2(model, name, lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = started()
    step(model, optimizer)
    write(tmp_path / "one", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(model, optimizer)
    other, its = started()
    back = read(tmp_path / "one")
    other.load_state_dict(back["model"])
    its.load_state_dict(back["optimizer"])
    step(other, its)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
