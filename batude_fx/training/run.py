"""The public function for one-shot training, `run`. It imports the training loop only when it is called."""

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
    """Train a network as a recipe says: learn ranks under the budget, decompose, train in Tucker form.

    Args:
        recipe: The recipe, as `Recipe.from_yaml` reads it.
        folder: The folder for the resolved recipe, checkpoints, log, pictures and the saved network; None writes
            nothing.
        resume: Continue from the folder's checkpoint, with the same numbers as if the run had not been interrupted.
        data: The images, if the recipe's `data` section cannot name them: a `batude_fx.training.data.Data`.

    Returns:
        The compressed network, its accuracy, flops and ranks, and a record of every round.

    Raises:
        RecipeError: When the recipe names a model that does not exist, or its budget is out of reach.
        TrainingError: When there are no images, there is nothing to resume, the loss is not finite, or accelerate is
            not installed.

    Source: M. Yin et al., "BATUDE: Budget-Aware Neural Network Compression Based on Tucker Decomposition", AAAI 2022,
        https://doi.org/10.1609/aaai.v36i8.20869.
    """
    check_accelerate()
    from batude_fx.training.loop import train

    return train(recipe, folder, resume=resume, data=data)


def check_accelerate() -> None:
    """Refuse to train without accelerate.

    Raises:
        TrainingError: When it is not installed.
    """
    if find_spec("accelerate") is None:
        raise TrainingError("training needs accelerate: pip install accelerate tensorboard")
