"""What a recipe asks to be compressed, and how far: the network, its sites, what they can be and may cost together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from batude_fx.budget.cost_limits import options_within_budget
from batude_fx.budget.rank_options import RankOptions
from batude_fx.errors import (
    BatudeError,
    BudgetError,
    DiscoveryError,
    SavedModelError,
    SelectionError,
    TrainingError,
    first_line,
)
from batude_fx.graph.discovery import discover
from batude_fx.graph.example_inputs import example_inputs
from batude_fx.graph.flops import count_costs
from batude_fx.graph.site_table import Sites
from batude_fx.graph.sites import ConvSite
from batude_fx.saving.weights import load_weights_, read_weights
from batude_fx.support.arrays import Integers
from batude_fx.support.model_state import eval_and_restore
from batude_fx.training.lagrangian import Constraint
from batude_fx.training.recipe import DataSection, Recipe
from batude_fx.zoo.create import create


def dense_network(recipe: Recipe, *, weights: bool = True) -> nn.Module:
    """The network that a recipe starts from.

    Args:
        recipe: Its `model` section says which.
        weights: Whether to fetch or read its weights.

    Raises:
        RecipeError: There is no such network, or its weights do not fit.
    """
    section = recipe.model
    try:
        model = create(section.name, pretrained=section.pretrained and weights, **section.args)
    except BatudeError as error:
        raise recipe.problem("model.name", str(error)) from None
    except (RuntimeError, OSError, TypeError, ValueError, AssertionError, KeyError, AttributeError) as error:
        reason = first_line(error)
        way_out = ". Weights of your own are named by model.checkpoint, none by model.pretrained=false"
        raise recipe.problem(
            "model", f"{section.name} cannot be built: {reason}{way_out * section.pretrained}"
        ) from error
    if section.checkpoint and weights:
        try:
            load_weights_(model, read_weights(section.checkpoint))
            model.float()  # whatever they were kept in
        except SavedModelError as error:
            way_out = "A file of torch.save becomes one of safetensors by safetensors.torch.save_model"
            raise recipe.problem("model.checkpoint", f"{error} {way_out}") from None
    return model.to(memory_format=torch.channels_last) if section.channels_last else model


@dataclass(frozen=True)
class Problem:
    """What is to be compressed, and how far.

    Attributes:
        inputs: Example input that flops are counted on.
        found: Every convolution, those that stay dense too.
        sites: Site name to site, all of them replaceable.
        options: Site name to what the site can be.
        dense: Flops and parameters of the dense network.
        classes: Number of its outputs.
        most: (2,) flops and parameters that all sites together may need.
    """

    inputs: tuple[Tensor]
    found: Sites
    sites: Mapping[str, ConvSite]
    options: Mapping[str, RankOptions]
    dense: tuple[int, int]
    classes: int
    most: Integers

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> "Problem":
        """The problem of a recipe.

        Raises:
            RecipeError: The network is no image classifier, a pattern matches no site, or the budget is out of reach or
                met by the dense network.
        """
        wanted = recipe.one_shot
        if recipe.budget.latency is not None:
            raise recipe.problem("budget.latency", "training keeps to flops and params; measure afterwards")
        try:
            inputs = _inputs_(model, recipe.data)
            classes = _classes(model, inputs)
            found = discover(model, inputs, layers=wanted.layers, include=wanted.include, exclude=wanted.exclude)
        except SelectionError as error:
            raise recipe.problem("one_shot", str(error)) from None
        except (DiscoveryError, TrainingError) as error:
            raise recipe.problem("model.name", str(error)) from None
        _check_head(model, recipe, classes)
        sites = found.replaceable()
        dense = count_costs(model, inputs)
        try:
            options, account = options_within_budget(sites, wanted.round_to, recipe.budget, dense, {}, adds_bias=False)
        except BudgetError as error:
            raise recipe.problem("budget", str(error)) from None
        problem = cls(inputs, found, sites, options, dense, classes, account.capacity(options.values()))
        if (problem.most >= problem.sites_dense()).all():
            raise recipe.problem("budget", f"the dense network meets it, with {dense[0]:,} flops; give a smaller one")
        return problem

    def constraints(self, model: nn.Module) -> dict[str, Constraint]:
        """Every site with its layer in a model."""
        return {
            name: Constraint(one, model.get_submodule(name), self.options[name]) for name, one in self.sites.items()
        }

    def limit(self, share: float) -> Integers:
        """(2,) what all sites may need when a share of the way from dense to the budget is gone."""
        dense = self.sites_dense()
        return np.where(self.most < dense, (dense + share * (self.most - dense)).astype(np.int64), self.most)

    def total_flops(self, sites: int) -> int:
        """Of the whole network, when its sites need so many."""
        return self.dense[0] - int(self.sites_dense()[0]) + sites

    def sites_dense(self) -> Integers:
        """(2,) flops and parameters of all sites in the dense network."""
        total: Integers = np.sum([one.dense for one in self.options.values()], axis=0)
        return total


def _inputs_(model: nn.Module, data: DataSection) -> tuple[Tensor]:
    """One image (1, C, H, W); the network is told what its images are like, for whoever loads, shows or exports it."""
    image, *more = example_inputs(model)
    if more or not isinstance(image, Tensor) or image.ndim != 4:  # noqa: PLR2004 - (1, C, H, W)
        raise TrainingError(f"{type(model).__name__} takes no batch of images; recipes train image classifiers.")
    side = data.image_size
    image = F.interpolate(image, (side, side)) if side else image
    channels = image.shape[1]
    known = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
    told: dict[str, Any] = {"crop_pct": 1.0} if data.pad else {}
    if len(known["mean"]) != channels:  # a network for other channels than those it was published for
        told |= {key: (sum(known[key]) / len(known[key]),) * channels for key in ("mean", "std")}
    if side or told:
        config = {**getattr(model, "pretrained_cfg", {}), "input_size": tuple(image.shape[1:]), **told}
        vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config
    return (image,)


def _check_head(model: nn.Module, recipe: Recipe, classes: int) -> None:
    """A head for other classes than the published ones starts untrained, and must not teach."""
    published = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", 1000)
    fresh = recipe.model.pretrained and "num_classes" in recipe.model.args and classes != published
    if fresh and not recipe.pretrain and (recipe.one_shot.distillation or recipe.finalize.distillation):
        raise recipe.problem(
            "pretrain",
            f"the head for {classes} classes starts untrained, as the published one has {published}, and would be the "
            "teacher; train it first, with --set pretrain.epochs=10, or give model.checkpoint in place of "
            "model.pretrained",
        )


@torch.no_grad()
def _classes(model: nn.Module, inputs: tuple[Tensor]) -> int:
    try:
        with eval_and_restore(model):
            outputs = model(*inputs)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise TrainingError(
            f"{type(model).__name__} does not run on images of shape {tuple(inputs[0].shape)}: {reason}"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:  # noqa: PLR2004 - (n, classes)
        raise TrainingError(
            f"{type(model).__name__} is no classifier; recipes train networks with logits (n, classes)."
        )
    return outputs.shape[1]
