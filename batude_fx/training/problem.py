"""The compression problem of a recipe: the network, its sites, their possible ranks, and the costs they may have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from batude_fx.budget.cost_limits import make_search_space
from batude_fx.budget.rank_options import FLOPS, RankOptions
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
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy
from batude_fx.training.lagrangian import Constraint
from batude_fx.training.recipe import DataSection, Recipe
from batude_fx.zoo.create import create


def dense_network(recipe: Recipe, *, weights: bool = True) -> nn.Module:
    """Build the dense network of a recipe.

    Args:
        recipe: The recipe; its `model` section names the network.
        weights: Whether to load the weights that the recipe names; otherwise they are random.

    Raises:
        RecipeError: When there is no such network, or its weights do not fit.
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
            model.float()  # the file may hold another precision
        except SavedModelError as error:
            way_out = "A file of torch.save becomes one of safetensors by safetensors.torch.save_model"
            raise recipe.problem("model.checkpoint", f"{error} {way_out}") from None
    return model.to(memory_format=torch.channels_last) if section.channels_last else model


@dataclass(frozen=True)
class Problem:
    """The sites of a network, their possible ranks, and the costs that they may have together.

    Attributes:
        inputs: Example input, one image, on which flops are counted.
        all_sites: All convolutions, including those that stay dense.
        sites: Site name to site, of the sites that can be replaced.
        options: Site name to the possible ranks of the site.
        dense_costs: Flops and parameters of the dense network.
        classes: Number of outputs of the network.
        capacity: (2,) most flops and most parameters of all replaceable sites together.
        adds_bias: Whether compressed sites get a bias, which restores their moments where nothing trains the ranks.
    """

    inputs: Inputs
    all_sites: Sites
    sites: Mapping[str, ConvSite]
    options: Mapping[str, RankOptions]
    dense_costs: tuple[int, int]
    classes: int
    capacity: Integers
    adds_bias: bool

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> "Problem":
        """Return the problem that a recipe poses for its network.

        Raises:
            RecipeError: When the network is not an image classifier, a pattern matches no site, or the budget is out of
                reach or met by the dense network.
        """
        settings = recipe.one_shot
        for name in ("latency", "agreement", "score", "max_drop"):
            if getattr(recipe.budget, name) is not None:
                raise recipe.problem(
                    f"budget.{name}", "training can limit flops and params only; measure the rest afterwards"
                )
        try:
            inputs = _inputs_(model, recipe.data)
            classes = _classes(model, inputs)
            all_sites = discover(
                model, inputs, layers=settings.layers, include=settings.include, exclude=settings.exclude
            )
        except SelectionError as error:
            raise recipe.problem("one_shot", str(error)) from None
        except (DiscoveryError, TrainingError) as error:
            raise recipe.problem("model.name", str(error)) from None
        _check_head(model, recipe, classes)
        sites = all_sites.replaceable()
        dense_costs = count_costs(model, inputs)
        adds_bias = not settings.epochs.amount and bool(settings.calibration_images)
        try:
            space = make_search_space(sites, settings.round_to, recipe.budget, dense_costs, {}, adds_bias=adds_bias)
        except BudgetError as error:
            raise recipe.problem("budget", str(error)) from None
        problem = cls(inputs, all_sites, sites, space.options, dense_costs, classes, space.capacity(), adds_bias)
        if (problem.capacity >= problem.dense_site_costs()).all():
            raise recipe.problem(
                "budget", f"the dense network meets it, with {dense_costs[FLOPS]:,} flops; give a smaller one"
            )
        return problem

    def constraints(self, model: nn.Module) -> dict[str, Constraint]:
        """Return the constraint of every replaceable site, with its layer in a model."""
        return {
            name: Constraint(site, model.get_submodule(name), self.options[name]) for name, site in self.sites.items()
        }

    def capacity_at(self, reduction: float) -> Integers:
        """Return (2,) the costs that all sites may have after a share of the reduction from dense to the budget."""
        dense = self.dense_site_costs()
        reduced = (dense + reduction * (self.capacity - dense)).astype(np.int64)
        return np.where(self.capacity < dense, reduced, self.capacity)  # a cost without a limit stays without

    def total_flops(self, site_flops: int) -> int:
        """Return the flops of the whole network whose replaceable sites have `site_flops` in all."""
        return self.dense_costs[FLOPS] - int(self.dense_site_costs()[FLOPS]) + site_flops

    def dense_site_costs(self) -> Integers:
        """Return (2,) the flops and parameters of all replaceable sites in the dense network."""
        total: Integers = np.sum([options.dense for options in self.options.values()], axis=0)
        return total


def _inputs_(model: nn.Module, data: DataSection) -> Inputs:
    """Return one image (1, C, H, W), and write its size and normalization into the config that timm keeps in a model.

    Whoever loads, evaluates or exports the network later finds them there.
    """
    image = example_inputs(model).image
    if image is None:
        raise TrainingError(f"{type(model).__name__} takes no batch of images; recipes train image classifiers.")
    side = data.image_size
    image = F.interpolate(image, (side, side)) if side else image
    channels = image.shape[1]
    published = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
    changes: dict[str, Any] = {"crop_pct": 1.0} if data.pad else {}
    if len(published["mean"]) != channels:  # the network was built for another number of channels
        changes |= {key: (sum(published[key]) / len(published[key]),) * channels for key in ("mean", "std")}
    if side or changes:
        config = {**getattr(model, "pretrained_cfg", {}), "input_size": tuple(image.shape[1:]), **changes}
        vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config
    return Inputs((image,))


def _check_head(model: nn.Module, recipe: Recipe, classes: int) -> None:
    """Refuse to distill from a pretrained network whose head is random, as its number of classes was changed."""
    published = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", 1000)
    is_untrained = recipe.model.pretrained and "num_classes" in recipe.model.args and classes != published
    if is_untrained and not recipe.pretrain and (recipe.one_shot.distillation or recipe.finalize.distillation):
        raise recipe.problem(
            "pretrain",
            f"the head for {classes} classes starts untrained, as the published one has {published}, and would be the "
            "teacher; train it first, with --set pretrain.epochs=10, or give model.checkpoint in place of "
            "model.pretrained",
        )


@torch.no_grad()
def _classes(model: nn.Module, inputs: Inputs) -> int:
    """Return the number of outputs of a classifier; refuse other networks."""
    try:
        with private_copy(model) as copied:
            outputs = inputs.run(copied)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise TrainingError(
            f"{type(model).__name__} does not run on images of shape {tuple(inputs.tensors()[0].shape)}: {reason}"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:  # noqa: PLR2004 - (n, classes)
        raise TrainingError(
            f"{type(model).__name__} is not a classifier; recipes train networks with logits (n, classes)."
        )
    return outputs.shape[1]
