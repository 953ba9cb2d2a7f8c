"""One phase of a run: precision, averages, learning rates, and a loss that is no longer finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batude_fx
from batude_fx import TrainingError
from batude_fx.training.checkpoint_file import read
from batude_fx.training.recipe import _schedulers
from tests.training.tiny_recipe import CLASSES, tiny_recipe


def test_bfloat16_channels_last_and_mixup_train_within_the_budget(photos: Path) -> None:
    changes = {
        "model__precision": "bf16", "model__channels_last": True, "data__mixup": 0.2, "data__smoothing": 0.1,
        "data__auto_augment": "rand-m5", "data__erase": 0.2,
        "one_shot__optimizer": "adamw", "one_shot__calibration_images": 0,
    }  # fmt: skip
    result = batude_fx.run(tiny_recipe(photos, **changes))
    assert result.model.training is False
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    assert result.flops <= 0.5 * result.dense_flops


def test_a_moving_average_of_few_steps_follows_the_weights(photos: Path) -> None:
    """Though a decay of 0.9999 would keep the first weights for thousands of steps."""
    short = {"pretrain": None, "one_shot__epochs": 0, "finalize__batch_norm_images": 0}
    ways = ({"epochs": 0}, {"epochs": 9}, {"epochs": 9, "ema": 0.9999})
    before, after, averaged = (
        nn.utils.parameters_to_vector(batude_fx.run(tiny_recipe(photos, **short, finalize=way)).model.parameters())
        for way in ways
    )
    assert (averaged - before).norm() > 0.3 * (after - before).norm()


def test_slow_batch_norms_are_measured_on_images_before_the_original_is_evaluated(photos: Path) -> None:
    """torchvision's MobileNets move their statistics by a hundredth a step."""
    changes: dict[str, Any] = {"one_shot__epochs": 0, "finalize__epochs": 0, "budget": 0.9}
    changes |= {"pretrain": {"epochs": 4, "optimizer": "adamw", "lr": 0.003}, "data__scale": [0.9, 1.0]}
    section = {"name": "torchvision:mobilenet_v3_small", "args": {"num_classes": CLASSES}}
    known, stale = (
        batude_fx.run(tiny_recipe(photos, **changes, model=section, finalize__batch_norm_images=count))
        for count in (24, 0)
    )
    assert known.original_accuracy > stale.original_accuracy


@pytest.mark.parametrize(("phase", "words"), [
    ("pretrain", r"the loss is (nan|inf) after step 2 of pretrain"),
    ("one_shot", r"no longer finite\. Lower one_shot\.lr, now 1e"),
])  # fmt: skip
def test_a_run_that_diverges_is_stopped_and_writes_no_more(
    phase: str, words: str, photos: Path, tmp_path: Path
) -> None:
    """Evaluations are far apart; a checkpoint is due after every step, a round after every other one."""
    sections: dict[str, dict[str, Any]] = {"pretrain": {"epochs": 1}, "one_shot": {"epochs": 2, "interval": "2 steps"}}
    sections[phase]["lr"] = 1e30
    due = {"interval": "99 steps", "checkpoint": "1 steps" if phase == "pretrain" else "99 steps"}
    with pytest.raises(TrainingError, match=words):
        batude_fx.run(tiny_recipe(photos, **sections, eval=due), tmp_path / "run")
    if phase == "pretrain":
        kept = read(tmp_path / "run" / "checkpoint.safetensors")
        assert kept.step == 1


@pytest.mark.parametrize("scheduler", _schedulers())
def test_the_rate_falls_unless_it_is_constant(scheduler: str, photos: Path, tmp_path: Path) -> None:
    finalize = {"epochs": 1, "lr": 0.01, "scheduler": scheduler}
    changes = {"pretrain": None, "one_shot__epochs": 0, "finalize": finalize, "eval__interval": "1 steps"}
    batude_fx.run(tiny_recipe(photos, **changes), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, second, third = (line["lr"] for line in log if line["phase"] == "finalize")
    assert first == pytest.approx(0.01, rel=1e-6)
    assert third == second == first if scheduler == "constant" else 0 < third < second < first
