"""Checkpoints keep all state there is, of every optimizer, and damage to them is noticed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.optim._optim_factory import create_optimizer_v2
from torch import nn

from batude_fx import TrainingError
from batude_fx.training.checkpoint_file import Checkpoint, _checksum, read, write
from batude_fx.training.recipe import _optimizers


def _checkpoint(parts: dict[str, Any]) -> Checkpoint:
    return Checkpoint(phase="one_shot", step=3, parts=parts, kept={}, rounds=[], log=[])


def test_checkpoints_keep_whatever_state_there_is(tmp_path: Path) -> None:
    tree = {"a": {"0": torch.arange(3), 1: [1, 2.5, None, "x"]}, "empty": {}, "b": torch.zeros(0)}
    write(tmp_path / "one", _checkpoint(tree))
    back = read(tmp_path / "one").parts
    assert torch.equal(back["a"]["0"], torch.arange(3))
    assert back["a"][1] == [1, 2.5, None, "x"]
    assert back["empty"] == {}
    (tmp_path / "one").write_bytes((tmp_path / "one").read_bytes()[:-4])
    with pytest.raises(TrainingError, match="is broken"):
        read(tmp_path / "one")
    with pytest.raises(TrainingError, match="does not exist"):
        read(tmp_path / "two")


@given(bit=st.integers(0, 2**20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_wrong_bit_anywhere_is_noticed(bit: int, tmp_path: Path) -> None:
    path = tmp_path / "one"
    parts = {"w": torch.randn(5, 7), "half": torch.randn(9).bfloat16(), "flags": torch.tensor([True]), "steps": 12}
    write(path, _checkpoint(parts))
    content = bytearray(path.read_bytes())
    position = bit % (8 * len(content))
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"(is broken: .*|an older batude_fx.*)[Ss]tart again in a new folder"):
        read(path)


@pytest.mark.parametrize(("change", "words"), [
    ({"step": -1}, "step: Input should be greater than or equal to 0"),
    ({"step": "many"}, "step: Input should be a valid integer"),
    ({"phase": "bake"}, "phase: Input should be 'pretrain'"),
    ({"parts": [1, 2]}, "parts: Input should be a valid dictionary"),
    ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ({"log": [1]}, r"log\.0: Input should be a valid dictionary"),
    ({"log": {"list": 1}}, "lacks 'pairs'"),
    ({"log": [{"pairs": [["loss", [1]]]}]}, r"log\.0\.loss"),
    ({"rounds": [{"pairs": [["phase", "one_shot"]]}]}, r"rounds\.0\.step: Field required"),
    ({"kept": {"pairs": [["ranks", 3]]}}, r"kept\.ranks: Input should be a valid dictionary"),
    ({"kept": {"pairs": [["original_accuracy", 7]]}}, r"kept\.original_accuracy: Input should be less than"),
    ({"kept": {"pairs": [["others", 7]]}}, r"kept\.others: Extra inputs are not permitted"),
    ({"phase": "finalize"}, "lacks the ranks that are finalized"),
    ({"kept": {"tensor": 7}}, "lacks '7'"),
    ({"kept": {"pairs": 1}}, "not iterable"),
    ({"kept": {}}, "lacks 'pairs'"),
    ({"kept": {"pairs": [[[], 1]]}}, "unhashable"),
])  # fmt: skip
def test_a_checkpoint_of_another_structure_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Even where its checksum is right."""
    empty: dict[str, Any] = {"pairs": []}
    tree = {"phase": "pretrain", "step": 0, "parts": empty, "kept": empty, "rounds": [], "log": []} | change
    text = json.dumps({"pairs": list(tree.items())})
    save_file({}, tmp_path / "one", {"tree": text, "checksum": _checksum(text, {})})
    with pytest.raises(TrainingError, match=words):
        read(tmp_path / "one")


def test_a_checkpoint_without_a_checksum_is_of_an_older_version(tmp_path: Path) -> None:
    save_file({}, tmp_path / "one", {"tree": '{"pairs": []}'})
    with pytest.raises(TrainingError, match="was written by an older batude_fx, without the checksum"):
        read(tmp_path / "one")


def test_a_checkpoint_nested_without_end_is_refused(tmp_path: Path) -> None:
    text = "[" * 100_000
    save_file({}, tmp_path / "one", {"tree": text, "checksum": _checksum(text, {})})
    with pytest.raises(TrainingError, match="is broken"):
        read(tmp_path / "one")


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
    write(tmp_path / "one", _checkpoint({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    step(model, optimizer)
    other, its = started()
    back = read(tmp_path / "one").parts
    other.load_state_dict(back["model"])
    its.load_state_dict(back["optimizer"])
    step(other, its)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
