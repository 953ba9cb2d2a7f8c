"""A run that was killed at any step ends at the same weights as one that was not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import batude_fx
from tests.training.tiny_recipe import tiny_recipe

_ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


_KILLED = """
import os, signal, sys
from batude_fx import Recipe
from batude_fx import run
from batude_fx.training import phase

steps, original = 0, phase._Trainer.step

def step(*arguments):
    global steps
    steps += 1
    if steps > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

phase._Trainer.step = step
run(Recipe.from_yaml(sys.argv[1]), sys.argv[2], resume=sys.argv[4] == "resume")
"""


def test_a_run_killed_three_times_ends_at_the_same_weights(
    photos: Path, tmp_path: Path, finished: tuple[Path, Any]
) -> None:
    recipe, folder = tmp_path / "my.yaml", tmp_path / "run"
    recipe.write_text(tiny_recipe(photos).to_yaml(), encoding="utf-8")
    steps = np.random.default_rng().integers(1, 4, 3).tolist()  # of 12
    print("killed after", steps)  # noqa: T201 - for whoever sees it fail
    for index, count in enumerate([*steps, 99]):
        arguments = [str(recipe), str(folder), str(count), "resume" if index else "new"]
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _KILLED, *arguments], env=_ONE_THREAD, capture_output=True, text=True, check=False
        )
        assert done.returncode == (0 if count == 99 else -9), done.stderr
    undisturbed, _ = finished
    ours, theirs = (load_file(place / "model" / "model.safetensors") for place in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [(place / "log.jsonl").read_text(encoding="utf-8") for place in (folder, undisturbed)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("left", [".config.json.1.tmp", "model.safetensors"])
def test_a_run_killed_while_its_network_is_saved_can_be_resumed(left: str, photos: Path, tmp_path: Path) -> None:
    recipe, folder = (
        tiny_recipe(photos, pretrain=None, one_shot__epochs="2 steps", finalize__epochs="1 steps"),
        tmp_path,
    )
    batude_fx.run(recipe, folder / "run")
    (folder / "run" / "result.json").unlink()
    shutil.rmtree(model := folder / "run" / "model")
    model.mkdir()
    (model / left).touch()
    batude_fx.run(recipe, folder / "run", resume=True)
    names = {path.name for path in model.iterdir()}
    assert names == {"config.json", "model.safetensors", "report.html", "report.json"}
    batude_fx.load(model)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".recipe.yaml.1.tmp").touch()
    batude_fx.run(recipe, tmp_path / "new")
