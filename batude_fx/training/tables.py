"""The tables of training: the shipped recipes, the schedule that a dry run shows, and the result of a run."""

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
    """Names of recipes, and what they do."""
    table = new_table(min_width=None, padding=(0, 1, 0, 0))
    for column in ("recipe", "network", "flops", "images", "epochs"):
        table.add_column(column, no_wrap=column == "recipe", overflow="fold")
    for name, one in recipes.items():
        phases = (one.pretrain, one.one_shot, one.finalize)
        epochs = " + ".join(str(phase.epochs).removesuffix(" epochs") for phase in phases if phase)
        images = one.data.name.removeprefix("torch/") or "a folder"
        budget = str(one.budget).removeprefix("flops ")
        add_row(table, name, one.model.name, budget, images, epochs)
    table.caption = "batude-fx recipes show NAME prints one, batude-fx train NAME --dry-run says what it would do."
    return table


def schedule_table(recipe: Recipe, ahead: Preview) -> Group:
    """The phases of a recipe and the rounds of its one-shot training."""
    phases = new_table("phase", "length", "optimizer", "lr", "schedule", "distillation", title="schedule")
    for name in ("pretrain", "one_shot", "finalize"):
        one = getattr(recipe, name)
        if one:
            teacher = getattr(one, "distillation", None)
            taught = f"{teacher.weight:g}, T = {teacher.temperature:g}" if teacher else "-"
            warm = f", warm-up {one.warmup}" if one.warmup.amount else ""
            add_row(phases, name, str(one.epochs), one.optimizer, f"{one.lr:g}", f"{one.scheduler}{warm}", taught)
    unit = recipe.one_shot.epochs.unit.removesuffix("s")
    rounds = new_table("round", f"from {unit}", "flops that remain", "rho", title="rounds of one_shot")
    for index, (epoch, keep, rho) in enumerate(ahead.rounds):
        add_row(rounds, str(index), f"{epoch:g}", percent(keep, 1), f"{rho:.2g}")
    rounds.caption = (
        f"fvcore counts {human(ahead.flops)}FLOPs of {human(ahead.plan.dense_flops)}FLOPs, "
        f"{ahead.plan.dense_flops / ahead.flops:.3f} times fewer. The plan's ranks are those of fresh weights: they "
        "show that the budget can be met, training finds others. Nothing was trained."
    )
    return Group(phases, rounds)


def result_table(folder: str, result: "Result") -> Table:
    """What a run gave, before and after."""
    table = new_table("", "original", "compressed", "", title=folder)
    add_row(table, "accuracy", f"{result.original_accuracy:.2%}", f"{result.accuracy:.2%}", "")
    for name, before, after in (
        ("flops", result.dense_flops, result.flops), ("parameters", result.dense_params, result.params)
    ):  # fmt: skip
        add_row(table, name, human(before).strip(), human(after).strip(), f"{percent(after, before)} remain")
    table.caption = (
        f"{len(result.ranks)} sites in Tucker form after {len(result.rounds)} rounds. In the folder: model/ for "
        "batude_fx.load with its report.html, ranks.png, result.json, log.jsonl, recipe.yaml, original.safetensors."
    )
    return table
