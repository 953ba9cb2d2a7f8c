"""A dry run needs no accelerate, and depends on the seed alone."""

import json
import subprocess
import sys

import torch
from rich.table import Table

from batude_fx import Recipe
from batude_fx.compression.recipe_preview import preview, schedule_table

WITHOUT_ACCELERATE = """
import sys
sys.modules["accelerate"] = None
import batude_fx
from batude_fx_cli.app import app
app(["train", "digits-demo", "--dry-run", "--json"], standalone_mode=False)
try:
    batude_fx.run(batude_fx.Recipe.from_yaml("digits-demo"))
except batude_fx.TrainingError as error:
    print(error)
"""


def test_without_accelerate_there_is_a_dry_run_and_one_line() -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_ACCELERATE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    facts, _, said = done.stdout.rpartition("}")
    assert json.loads(facts + "}")["factor"] > 1
    assert said.strip() == "training needs accelerate: pip install accelerate tensorboard"


def test_a_dry_run_depends_on_the_seed_alone() -> None:
    recipe = Recipe.from_yaml("digits-demo")
    before = torch.get_rng_state()
    ranks = [preview(recipe).plan.ranks for _ in range(2)]
    assert ranks[0] == ranks[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_rounds_whose_number_the_images_decide_have_no_table() -> None:
    recipe = Recipe.from_yaml("digits-demo", ["one_shot.interval=2 steps"])
    (phases,) = schedule_table(recipe, preview(recipe)).renderables
    assert isinstance(phases, Table)
    assert str(phases.caption).startswith(
        "A round of one_shot takes 2 steps; how many there are depends on the images."
    )
