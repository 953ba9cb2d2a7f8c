"""Weights that are missing, or not those of the network that the config describes, are refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batude_fx
from batude_fx.errors import SavedModelError
from batude_fx.saving import weights


def _load(folder: Path) -> dict[str, Tensor]:
    return weights.read_weights(folder / "model.safetensors")


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(SavedModelError, match="the folder is incomplete"):
        batude_fx.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.weight"), "1 tensors are missing and 0 are unknown, 'fc.weight' first"),
        (lambda state: state.update(extra=torch.zeros(1)), "'extra' first"),
        (lambda state: state.update({"fc.bias": torch.zeros(6)}), "(6,) of torch.float32"),
        (lambda state: state.update({"fc.bias": torch.zeros(5, dtype=torch.int32)}), "torch.int32"),
        (lambda state: state.update({"bn1.num_batches_tracked": torch.tensor(1.5)}), "torch.float32"),
        (
            lambda state: state.update({"bn1.bias": state["bn1.bias"].to(torch.float8_e4m3fn)}),
            "no dtype that networks run in",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, saved: tuple[nn.Module, Path], folder: Path
) -> None:
    from safetensors.torch import save_file

    state = {name: value.clone() for name, value in _load(saved[1]).items()}
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(SavedModelError, match=re.escape(message)):
        batude_fx.load(folder)
