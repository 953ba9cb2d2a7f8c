"""Tables of the shipped recipes and of the result of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from batude_fx.support.numbers import human, percent
from batude_fx.support.tables import add_row, new_table
from batude_fx.training.recipe import Recipe

if TYPE_CHECKING:  # the loop needs accelerate, a dry run does not
    from batude_fx.training.loop import Result


def recipes_table(recipes: Mapping[str, Recipe]) -> Table:
    """Return a table of recipes: network, budget, images and epochs."""
    table = new_table(min_width=None, padding=(0, 1, 0, 0))
    for column in ("recipe", "network", "flops", "images", "epochs"):
        table.add_column(column, no_wrap=column == "recipe", overflow="fold")
    for name, recipe in recipes.items():
        phases = (recipe.pretrain, recipe.one_shot, recipe.finalize)
        epochs = " + ".join(str(phase.epochs).removesuffix(" epochs") for phase in phases if phase)
        images = recipe.data.name.removeprefix("torch/") or "a folder"
        budget = str(recipe.budget).removeprefix("flops ")
        add_row(table, name, recipe.model.name, budget, images, epochs)
    table.caption = "batude-fx recipes show NAME prints a recipe, batude-fx train NAME --dry-run shows its schedule."
    return table


def result_table(folder: str, result: "Result") -> Table:
    """Return a table of the original and the compressed network."""
    table = new_table("", "original", "compressed", "", title=folder)
    if result.accuracy is not None:
        add_row(table, "accuracy", f"{result.original_accuracy:.2%}", f"{result.accuracy:.2%}", "")
    for name, before, after in (
        ("flops", result.dense_flops, result.flops), ("parameters", result.dense_params, result.params)
    ):  # fmt: skip
        add_row(table, name, human(before).strip(), human(after).strip(), f"{percent(after, before)} remain")
    quality = f"The network {result.quality}. " if result.quality else ""
    table.caption = (
        f"{quality}{len(result.ranks)} sites in Tucker form after {len(result.rounds)} rounds. The folder contains "
        "model/ for batude_fx.load with its report.html, ranks.png, result.json, log.jsonl, recipe.yaml and "
        "original.safetensors."
    )
    return table
