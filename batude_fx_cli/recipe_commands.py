"""The commands about recipes: list, show, validate and explain them, and train by one. No logic of their own."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from batude_fx_cli.terminal import one_line_errors, print_line, say, show

recipes = typer.Typer(help="Recipes of one-shot training: YAML files of names and numbers.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]
Name = Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")]
Model = Annotated[
    str | None, typer.Option(help="Another network than the recipe's; the same as --set model.name=NAME.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe; repeat for several.")]


@recipes.command("list")
@one_line_errors
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with the package.

    Example: batude-fx recipes list
    """
    from batude_fx.training.recipe import Recipe, shipped
    from batude_fx.training.tables import recipes_table

    read = {name: Recipe.from_yaml(path) for name, path in shipped().items()}
    facts = {name: {"model": one.model.name, "budget": str(one.budget)} for name, one in read.items()}
    show(recipes_table(read), facts, as_json)


@recipes.command("show")
@one_line_errors
def show_recipe(recipe: Name, settings: Set = None, *, resolved: Annotated[bool, typer.Option(
    "--resolved", help="Every setting, the defaults too, in place of the file as it is written.")] = False,
) -> None:  # fmt: skip
    """Print a recipe: the file with its comments, or all settings as they would be used.

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
    files: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Names of shipped recipes, or YAML files.")],
) -> None:
    """Check recipes: names, types, values, that the model exists and that its budget is within reach.

    Each problem is one line with file, line, key and what was expected. Exit code 1 when there is one.

    Example: batude-fx recipes validate recipes/*.yaml
    """
    from batude_fx.errors import BatudeError
    from batude_fx.training.problem import Problem, dense_network
    from batude_fx.training.recipe import Recipe

    broken = 0
    for name in files:
        try:
            recipe = Recipe.from_yaml(name)
            Problem.of(dense_network(recipe, weights=False), recipe)
        except BatudeError as error:
            broken += 1
            for line in str(error).splitlines():
                say(line, "red")
        else:
            print_line(f"{name}: valid")
    if broken:
        raise typer.Exit(1)


@recipes.command()
@one_line_errors
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    Example: batude-fx recipes schema > recipe.schema.json
    """
    from batude_fx.training.recipe import Recipe

    json.dump(Recipe.model_json_schema(), sys.stdout, indent=2)
    sys.stdout.write("\n")


@one_line_errors
def train(
    recipe: Name, model: Model = None, settings: Set = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE.")] = None, *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and train nothing.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train a network by a recipe: ranks learned under the budget, decomposition, training in Tucker form.

    The folder gets the resolved recipe, checkpoints, a log, TensorBoard events, a picture of the ranks, a report and
    the compressed network. On several GPUs or machines: accelerate launch -m batude_fx train RECIPE

    Example, with a head for 14 classes that is trained first:
    batude-fx train any-timm-model --model resnet34 --set data.root=photos --set model.args.num_classes=14
    --set pretrain.epochs=10
    """
    from batude_fx.training.recipe import Recipe, find

    read = Recipe.from_yaml(recipe, [*(settings or ()), *([f"model.name={model}"] if model else ())])
    if dry_run:
        from batude_fx.compression.plan import plan_table
        from batude_fx.training.preview import preview
        from batude_fx.training.tables import schedule_table

        ahead = preview(read)
        if not as_json:
            sys.stdout.write(read.to_yaml())
        show(Group(plan_table(ahead.plan), schedule_table(read, ahead)), ahead.facts(), as_json)
        return
    from batude_fx.training.run import run

    folder = output or Path("runs") / find(recipe).stem
    with redirect_stdout(sys.stderr):  # torch.hub says there what it fetches, in the way of --json
        result = run(read, folder, resume=resume)
    from accelerate import PartialState

    from batude_fx.training.tables import result_table

    if PartialState().is_main_process:
        show(result_table(str(folder), result), {**result.facts(), "folder": str(folder)}, as_json)
