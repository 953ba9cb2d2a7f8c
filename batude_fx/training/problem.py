"""What a recipe asks to be compressed, and how far: the network, its sites, what they can be and may cost together."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from batude_fx.allocation import Integers, Options
from batude_fx.borrowing import borrowed
from batude_fx.capacity import capacity, choices
from batude_fx.discovery import discover
from batude_fx.errors import TrainingError
from batude_fx.flops import count_flops
from batude_fx.plugin import create
from batude_fx.recipe import ModelSection, Recipe
from batude_fx.serialization import load_weights_, read_weights
from batude_fx.sites import ConvSite
from batude_fx.training.adl import Constraint
from batude_fx.zoo import example_inputs


def dense_network(section: ModelSection, *, weights: bool = True) -> nn.Module:
    """The network that a recipe starts from.

    Args:
        section: The recipe's `model`.
        weights: Whether to fetch or read its weights.
    """
    model = create(section.name, pretrained=section.pretrained and weights, **section.args)
    if section.checkpoint and weights:
        load_weights_(model, read_weights(section.checkpoint))
    return model.to(memory_format=torch.channels_last) if section.channels_last else model


@dataclass(frozen=True)
class Problem:
    """What is to be compressed, and how far.

    Attributes:
        inputs: Example input that flops are counted on.
        sites: Site name to site, all of them replaceable.
        options: Site name to what the site can be.
        dense: Flops and parameters of the dense network.
        classes: Number of its outputs.
        most: (2,) flops and parameters that all sites together may need.
    """

    inputs: tuple[object, ...]
    sites: Mapping[str, ConvSite]
    options: Mapping[str, Options]
    dense: tuple[int, int]
    classes: int
    most: Integers

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> "Problem":
        """The problem of a recipe.

        Raises:
            BudgetError: The budget is out of reach.
            TrainingError: The network is no classifier.
        """
        wanted, inputs = recipe.one_shot, example_inputs(model)
        found = discover(model, inputs, layers=wanted.layers, include=wanted.include, exclude=wanted.exclude)
        sites = {site.name: site for site in found if site.skip_reason is None}
        options = choices(sites, wanted.round_to, {}, adds_bias=False)
        dense = count_flops(model, inputs), sum(parameter.numel() for parameter in model.parameters())
        most, _ = capacity(options.values(), recipe.budget, dense, wanted.round_to)
        return cls(inputs, sites, options, dense, _classes(model, inputs), most)

    def constraints(self, model: nn.Module) -> dict[str, Constraint]:
        """Every site with its layer in a model."""
        return {
            name: Constraint(one, model.get_submodule(name), self.options[name]) for name, one in self.sites.items()
        }

    def limit(self, share: float) -> Integers:
        """(2,) what all sites may need when a share of the way from dense to the budget is gone."""
        dense = self._sites_dense()
        return np.where(self.most < dense, (dense + share * (self.most - dense)).astype(np.int64), self.most)

    def total_flops(self, sites: int) -> int:
        """Of the whole network, when its sites need so many."""
        return self.dense[0] - int(self._sites_dense()[0]) + sites

    def _sites_dense(self) -> Integers:
        total: Integers = np.sum([one.dense for one in self.options.values()], axis=0)
        return total


@torch.no_grad()
def _classes(model: nn.Module, inputs: tuple[object, ...]) -> int:
    with borrowed(model):
        outputs = model(*inputs)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:  # noqa: PLR2004 - (n, classes)
        raise TrainingError(
            f"{type(model).__name__} is no classifier; recipes train networks with logits (n, classes)."
        )
    return outputs.shape[1]
