"""A run that was killed, interrupted or failed ends at the same weights as one that was not."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import batude_fx
from batude_fx import TrainingError
from batude_fx.support.atomic_files import lock_folder
from batude_fx.training import checkpoint_file, phase
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


def _assert_same_end(folder: Path, undisturbed: Path) -> None:
    ours, theirs = (load_file(place / "model" / "model.safetensors") for place in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [(place / "log.jsonl").read_text(encoding="utf-8") for place in (folder, undisturbed)]
    assert logs[0] == logs[1]


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
    _assert_same_end(folder, finished[0])


_RARELY: dict[str, Any] = {"eval": {"interval": 1, "checkpoint": "99 steps"}}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_first(
    number: signal.Signals, photos: Path, tmp_path: Path, finished: tuple[Path, Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe, folder, original = tiny_recipe(photos, **_RARELY), tmp_path / "run", phase._Trainer.step
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def step(trainer: Any, step: int, batches: Any) -> torch.Tensor:
        if (trainer.phase, step) == ("one_shot", 3):
            os.kill(os.getpid(), number)
        return original(trainer, step, batches)

    with monkeypatch.context() as patch:
        patch.setattr(phase._Trainer, "step", step)
        with pytest.raises(TrainingError, match="interrupted after step 4 of one_shot; resume it with --resume"):
            batude_fx.run(recipe, folder)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    capsys.readouterr()
    (folder / "recipe.yaml").write_text(tiny_recipe(photos).to_yaml())  # differs in how often it writes only
    batude_fx.run(tiny_recipe(photos), folder, resume=True)
    assert "resuming after step 4 of one_shot" in capsys.readouterr().err
    _assert_same_end(folder, finished[0])


def test_a_second_signal_stops_at_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(phase._Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        batude_fx.run(tiny_recipe(photos))


def test_every_phase_ends_with_a_checkpoint(
    photos: Path, tmp_path: Path, finished: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where none is due; from each of them the run comes to the same end."""
    written: list[tuple[str, int]] = []
    original = checkpoint_file.write

    def write(path: Path, checkpoint: checkpoint_file.Checkpoint) -> None:
        original(path, checkpoint)
        original(path.parents[1] / checkpoint.phase, checkpoint)
        written.append((checkpoint.phase, checkpoint.step))

    folder, recipe = tmp_path / "run", tiny_recipe(photos, **_RARELY)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file, "write", write)
        batude_fx.run(recipe, folder)
    assert written == [("pretrain", 3), ("one_shot", 6), ("finalize", 3)]
    for name, _ in written:
        (folder / "result.json").unlink()
        (tmp_path / name).replace(folder / "checkpoint.safetensors")
        batude_fx.run(recipe, folder, resume=True)
        ours, theirs = (load_file(place / "model" / "model.safetensors") for place in (folder, finished[0]))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(photos, pretrain=None, one_shot__epochs=0, finalize__epochs=0)
    batude_fx.run(recipe, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    batude_fx.run(recipe, tmp_path / "run", resume=True)
    assert "has no checkpoint yet, so the run begins anew" in capsys.readouterr().err


def test_a_finished_run_that_was_killed_at_its_end_is_tidied_up(finished: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(finished[0], folder := tmp_path / "run")
    files = {path.name for path in folder.iterdir()}
    (folder / "checkpoint.safetensors").write_bytes(b"it is removed last")
    (folder / ".lock").touch()
    recipe = batude_fx.Recipe.from_yaml(folder / "recipe.yaml")
    with pytest.raises(TrainingError, match=r"is finished; see result\.json there"):
        batude_fx.run(recipe, folder, resume=True)
    assert {path.name for path in folder.iterdir()} == files


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_with_who_uses_it(resume: bool, photos: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(photos, pretrain=None, one_shot__epochs=0, finalize__epochs=0)
    if resume:
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    words = rf"is in use: process {os.getpid()} on .* trains in it\. Wait until it ends, or give another folder"
    with lock_folder(tmp_path), pytest.raises(TrainingError, match=words):
        batude_fx.run(recipe, tmp_path, resume=resume)
    batude_fx.run(recipe, tmp_path, resume=resume)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def _fail_late(_module: nn.Module, _args: object, _output: object) -> None:
    raise RuntimeError("the server of the metrics\ndoes not answer")


def test_an_error_in_the_middle_says_when_and_what_to_do(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = phase._Trainer.step

    def step(trainer: Any, step: int, batches: Any) -> torch.Tensor:
        if (trainer.phase, step) == ("one_shot", 2):
            trainer.model.register_forward_hook(_fail_late)
        return original(trainer, step, batches)

    monkeypatch.setattr(phase._Trainer, "step", step)
    words = (
        r"^step 3 of one_shot failed: RuntimeError: does not answer\. If the cause is outside of the recipe, mend it "
        r"and resume it with --resume, or resume=True\. Otherwise change the recipe and give a new folder\.$"
    )
    with pytest.raises(TrainingError, match=words):
        batude_fx.run(tiny_recipe(photos), tmp_path / "run")


@pytest.mark.parametrize(("writes", "words"), [(True, "begin again in a new folder"), (False, "begin again")])
def test_without_a_checkpoint_no_one_is_told_to_resume(
    writes: bool, words: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(phase._Trainer, "step", step)
    with pytest.raises(TrainingError, match=rf"no memory\. Mend the cause, or change the recipe, and {words}\.$"):
        batude_fx.run(tiny_recipe(photos), tmp_path / "run" if writes else None)


@pytest.mark.parametrize("file", ["checkpoint.safetensors", "log.jsonl", "original.safetensors"])
def test_a_full_disk_is_an_error_of_one_line(
    file: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.replace

    def replace(source: Path, target: Path) -> Path:
        if Path(target).name == file:
            raise OSError(28, "No space left on device", str(target))
        return original(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(TrainingError, match="No space left on device"):
        batude_fx.run(tiny_recipe(photos), tmp_path / "run")
    monkeypatch.undo()
    batude_fx.run(tiny_recipe(photos), tmp_path / "run", resume=True)


def test_a_wrong_bit_in_the_original_is_noticed(photos: Path, tmp_path: Path) -> None:
    recipe, folder = tiny_recipe(photos, one_shot__epochs="1 steps", finalize__epochs="1 steps"), tmp_path / "run"
    batude_fx.run(recipe, folder)
    checkpoint = checkpoint_file.Checkpoint(
        phase="one_shot", step=0, parts={}, kept={"original.safetensors": "0" * 64}, rounds=[], log=[]
    )
    checkpoint_file.write(folder / "checkpoint.safetensors", checkpoint)
    (folder / "result.json").unlink()
    with pytest.raises(TrainingError, match=r"original\.safetensors is broken: its checksum is wrong"):
        batude_fx.run(recipe, folder, resume=True)


def test_a_recipe_that_is_no_text_is_another_recipe(photos: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(photos)
    (tmp_path / "recipe.yaml").write_bytes(b"\xff" + recipe.to_yaml().encode())
    with pytest.raises(TrainingError, match=r"differs from the recipe of this run: there '.*xffmodel:', here 'model:'"):
        batude_fx.run(recipe, tmp_path, resume=True)


def test_rounds_of_other_sites_are_refused_before_anything_is_trained(photos: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(photos, pretrain=None, one_shot__epochs=0, finalize__epochs=0)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    numbers = dict.fromkeys(("step", "round", "primal", "dual", "rho", "flops", "keep"), 1)
    entry: dict[str, Any] = {**numbers, "phase": "one_shot", "ranks": {"conv9": [8, 8]}}
    checkpoint = checkpoint_file.Checkpoint(phase="one_shot", step=0, parts={}, kept={}, rounds=[entry], log=[])
    checkpoint_file.write(tmp_path / "checkpoint.safetensors", checkpoint)
    with pytest.raises(TrainingError, match=r"is no checkpoint of this run: '.*' is a site of the network or"):
        batude_fx.run(recipe, tmp_path, resume=True)
