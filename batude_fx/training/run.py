"""One-shot training: ranks learned in one run, then Tucker modules trained on. `run` is the only public verb."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from batude_fx.errors import TrainingError
from batude_fx.training.recipe import Recipe

if TYPE_CHECKING:
    from batude_fx.training.data import Data
    from batude_fx.training.loop import Result


def run(
    recipe: Recipe, folder: str | os.PathLike[str] | None = None, *, resume: bool = False, data: "Data | None" = None
) -> "Result":
    """Train a network as a recipe says: ranks under the budget, decomposition, training in Tucker form.

    Args:
        recipe: What to do, as `Recipe.from_yaml` reads it.
        folder: Where the resolved recipe, checkpoints, log, pictures and the saved network go; None writes nothing.
        resume: Go on from the folder's checkpoint, to the same numbers as if the run had never been killed.
        data: The images, where the recipe's `data` section cannot name them: a `batude_fx.training.data.Data`.

    Returns:
        The compressed network, its accuracy and flops, and how its ranks came about.

    Raises:
        RecipeError: The recipe asks for a model that does not exist, or its budget is out of reach.
        TrainingError: There are no images, nothing to go on from, the loss is not finite, or accelerate is missing.

    Source: M. Yin et al., "BATUDE: Budget-Aware Neural Network Compression Based on Tucker Decomposition", AAAI 2022,
        https://doi.org/10.1609/aaai.v36i8.20869.
    """
    if find_spec("accelerate") is None:
        raise TrainingError("training needs accelerate: pip install accelerate tensorboard")
    from batude_fx.training.loop import train

    return train(recipe, folder, resume=resume, data=data)
