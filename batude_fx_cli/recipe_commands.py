"""The command `train`, and the commands that list, print and check recipes."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from batude_fx_cli.terminal import one_line_errors, print_line, print_to_stderr, show

recipes = typer.Typer(help="List, print and check recipes: YAML files of settings for `train`.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Name = Annotated[str, typer.Argument(help="Name of a recipe that comes with the package, or a YAML file.")]
Model = Annotated[
    str | None, typer.Option(help="Network to train instead of the recipe's; short for --set model.name=NAME.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE that replaces a setting; can be repeated."),
]


@recipes.command("list")
@one_line_errors
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with the package.

    Example: batude-fx recipes list
    """
    from batude_fx.training.recipe import Recipe, shipped
    from batude_fx.training.tables import recipes_table

    by_name = {name: Recipe.from_yaml(path) for name, path in shipped().items()}
    facts = {name: {"model": recipe.model.name, "budget": str(recipe.budget)} for name, recipe in by_name.items()}
    show(recipes_table(by_name), facts, as_json)


@recipes.command("show")
@one_line_errors
def show_recipe(recipe: Name, settings: Set = None, *, resolved: Annotated[bool, typer.Option(
    "--resolved", help="Print all settings, defaults included, instead of the file as it is written.")] = False,
) -> None:  # fmt: skip
    """Print a recipe: the file with its comments, or all settings that a training would use.

    Example: batude-fx recipes show digits-demo --resolved
    """
    from batude_fx.training.recipe import Recipe, find

    if resolved or settings:
        sys.stdout.write(Recipe.from_yaml(recipe, settings or ()).to_yaml())
    else:
        sys.stdout.write(find(recipe).read_text(encoding="utf-8"))


@recipes.command()
@one_line_errors
def validate(
    files: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="Names of shipped recipes, or YAML files."),
    ],
) -> None:
    """Check recipes: keys, types and values, that the model exists, and that its budget is within reach.

    Each problem is printed on one line, with file, line, key and what was expected; the exit code is then 1.

    Example: batude-fx recipes validate recipes/*.yaml
    """
    from batude_fx.errors import BatudeError
    from batude_fx.training.problem import Problem, dense_network
    from batude_fx.training.recipe import Recipe

    invalid = 0
    for name in files:
        try:
            recipe = Recipe.from_yaml(name)
            Problem.of(dense_network(recipe, weights=False), recipe)
        except BatudeError as error:
            invalid += 1
            for line in str(error).splitlines():
                print_to_stderr(line, "red")
        else:
            print_line(f"{name}: valid")
    if invalid:
        raise typer.Exit(1)


@recipes.command()
@one_line_errors
def schema() -> None:
    """Print the JSON Schema of recipes, with which an editor can complete and check them.

    Example: batude-fx recipes schema > recipe.schema.json
    """
    from batude_fx.training.recipe import Recipe

    json.dump(Recipe.model_json_schema(), sys.stdout, indent=2)
    sys.stdout.write("\n")


@one_line_errors
def train(
    recipe: Name, model: Model = None, settings: Set = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write the run to, instead of runs/RECIPE.")
    ] = None, *,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show plan and schedule, and train nothing.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train a network by a recipe: learn ranks under the budget, decompose, and train the compressed network.

    The folder of the run receives the recipe with all settings, checkpoints,
    a log, TensorBoard events, a picture of the ranks, a report and the
    compressed network.

    On several GPUs or machines: accelerate launch -m batude_fx train RECIPE

    Example, which first trains a new classifier of 14 classes:
    batude-fx train any-timm-model --model resnet34 --set data.root=photos
    --set model.args.num_classes=14 --set pretrain.epochs=10
    """
    from batude_fx.training.recipe import Recipe, find

    resolved = Recipe.from_yaml(recipe, [*(settings or ()), *([f"model.name={model}"] if model else ())])
    if dry_run:
        from batude_fx.compression.plan import plan_table
        from batude_fx.compression.recipe_preview import preview, schedule_table

        ahead = preview(resolved)
        if not as_json:
            sys.stdout.write(resolved.to_yaml())
        show(Group(plan_table(ahead.plan), schedule_table(resolved, ahead)), ahead.facts(), as_json)
        return
    from batude_fx.training.run import run

    folder = output or Path("runs") / find(recipe).stem
    with redirect_stdout(sys.stderr):  # torch.hub prints its downloads, which are no part of --json
        result = run(resolved, folder, resume=resume)
    from accelerate import PartialState

    from batude_fx.training.tables import result_table

    if PartialState().is_main_process:
        show(result_table(str(folder), result), {**result.facts(), "folder": str(folder)}, as_json)
