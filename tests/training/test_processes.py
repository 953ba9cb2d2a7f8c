"""Several processes, and parts of a batch, end at the weights of one process and of the whole batch."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset

import batude_fx
from batude_fx import TrainingError
from batude_fx.training.data import _check_batches, _SeededDataset
from tests.training.tiny_recipe import CLASSES, TRAIN, composed_weights, tiny_recipe

_PROCESS = "import sys; from batude_fx import Recipe, run; run(Recipe.from_yaml(sys.argv[1]), sys.argv[2])"


def _processes(count: int, recipe: Path, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _PROCESS, str(recipe), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_a_stream_is_read_by_one_process(photos: Path) -> None:
    class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return iter(())

        def __len__(self) -> int:
            return TRAIN

    recipe, stream = tiny_recipe(photos), Stream()
    _check_batches(recipe, _SeededDataset(stream, 0), 1)
    with pytest.raises(TrainingError, match="only one process can read; this run has 2"):
        _check_batches(recipe, _SeededDataset(stream, 0), 2)


def test_two_processes_end_like_one(photos: Path, tmp_path: Path) -> None:
    """Same ranks, weights within 1e-4 after 21 steps at equal global batch; no batch-norm, which sees its share."""
    changes = {
        "model__args": {"num_classes": CLASSES, "norm_layer": "groupnorm1"}, "pretrain": None,
        "one_shot": {"epochs": 4, "lr": 0.01, "interval": "4 steps", "calibration_images": TRAIN},
        "finalize": {"epochs": 3, "lr": 0.01},
    }  # fmt: skip
    recipe = tmp_path / "my.yaml"
    recipe.write_text(tiny_recipe(photos, **changes).to_yaml(), encoding="utf-8")
    folders = [tmp_path / "one", tmp_path / "two"]
    for count, folder in enumerate(folders, 1):
        _processes(count, recipe, folder)
    one, two = (json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in folders)
    assert two["machine"]["processes"] == 2
    assert one["ranks"] == two["ranks"]
    assert [r["ranks"] for r in one["rounds"]] == [r["ranks"] for r in two["rounds"]]
    ours, theirs = (composed_weights(batude_fx.load(folder / "model")) for folder in folders)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-4) for name in ours)
    assert one["accuracy"] == two["accuracy"]


def test_accumulated_parts_train_like_the_whole_batch(photos: Path) -> None:
    """In float arithmetic, without batch-norm: the same ranks, and the same weights."""
    changes = {
        "model__args": {"num_classes": CLASSES, "norm_layer": "groupnorm1"}, "eval__interval": 9,
        "one_shot__calibration_images": 0,  # judged by images, two ranks can be so close that rounding decides
    }  # fmt: skip
    whole, parts = (batude_fx.run(tiny_recipe(photos, data__accumulate=count, **changes)) for count in (1, 2))
    assert whole.ranks == parts.ranks
    ours, theirs = (composed_weights(result.model) for result in (whole, parts))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-4) for name in ours)


def test_the_environment_of_accelerate_does_not_divide_gradients(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"pretrain": None, "one_shot__epochs": "2 steps", "finalize__epochs": 0}
    expected = batude_fx.run(tiny_recipe(photos, **changes)).rounds
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert batude_fx.run(tiny_recipe(photos, **changes)).rounds == expected
