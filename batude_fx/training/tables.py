"""Tables of the shipped recipes, of the schedule that a dry run shows, and of the result of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from batude_fx.support.numbers import human, percent
from batude_fx.support.tables import add_row, new_table
from batude_fx.training.preview import Preview
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


def schedule_table(recipe: Recipe, preview: Preview) -> Group:
    """Return tables of the phases of a recipe and of the rounds of its one-shot training."""
    phases = new_table("phase", "length", "optimizer", "lr", "schedule", "distillation", title="schedule")
    for name in ("pretrain", "one_shot", "finalize"):
        phase = getattr(recipe, name)
        if phase:
            teacher = getattr(phase, "distillation", None)
            distillation = f"{teacher.weight:g}, T = {teacher.temperature:g}" if teacher else "-"
            warmup = f", warm-up {phase.warmup}" if phase.warmup.amount else ""
            schedule = f"{phase.scheduler}{warmup}"
            add_row(phases, name, str(phase.epochs), phase.optimizer, f"{phase.lr:g}", schedule, distillation)
    summary = (
        f"fvcore counts {human(preview.flops)}FLOPs of {human(preview.plan.dense_flops)}FLOPs, "
        f"{preview.plan.dense_flops / preview.flops:.3f} times fewer. The ranks are those of random weights: they "
        "show that the budget can be met; training will find others. Nothing was trained."
    )
    if not preview.rounds:
        length = f"A round of one_shot takes {recipe.one_shot.interval}; how many there are depends on the images."
        phases.caption = f"{length} {summary}"
        return Group(phases)
    unit = recipe.one_shot.epochs.unit.removesuffix("s")
    rounds = new_table("round", f"from {unit}", "flops that remain", "rho", title="rounds of one_shot")
    for index, (epoch, keep, rho) in enumerate(preview.rounds):
        add_row(rounds, str(index), f"{epoch:g}", percent(keep, 1), f"{rho:.2g}")
    rounds.caption = summary
    return Group(phases, rounds)


def result_table(folder: str, result: "Result") -> Table:
    """Return a table of the original and the compressed network."""
    table = new_table("", "original", "compressed", "", title=folder)
    add_row(table, "accuracy", f"{result.original_accuracy:.2%}", f"{result.accuracy:.2%}", "")
    for name, before, after in (
        ("flops", result.dense_flops, result.flops), ("parameters", result.dense_params, result.params)
    ):  # fmt: skip
        add_row(table, name, human(before).strip(), human(after).strip(), f"{percent(after, before)} remain")
    table.caption = (
        f"{len(result.ranks)} sites in Tucker form after {len(result.rounds)} rounds. The folder contains model/ for "
        "batude_fx.load with its report.html, ranks.png, result.json, log.jsonl, recipe.yaml, original.safetensors."
    )
    return table
