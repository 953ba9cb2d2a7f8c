"""BC-ADL, the budget-constrained alternating direction Lagrangian: dense weights that learn to be of low rank.

The problem is to minimize loss(W) subject to W = z, where the ranks of z cost no more than the budget. Its augmented
Lagrangian, with a dual variable y for the constraint r = W - z = 0, is

    loss(W) + <y, r> + rho / 2 ||r||^2 = loss(W) + rho / 2 ||r + u||^2 - rho / 2 ||u||^2    with u = y / rho,

where the right side completes the square, which gives the scaled form of ADMM. It is minimized over W, then over z;
then y takes a step of gradient ascent:

1. W-step: minimize loss(W) + rho / 2 ||W - z + u||^2. This is a round of ordinary training steps, in which `penalty_`
   adds the gradient of the second term, rho (W - z + u).
2. z-step: minimize ||W + u - z||^2 over all z within the budget. `project_` comes close: a knapsack over all sites
   chooses the ranks, where the loss of a site is relative to the norm of its weight, and W + u is truncated to these
   ranks. The truncation is the nearest tensor of these ranks at pointwise sites, and quasi-optimal at others.
3. u-step: y grows by rho times the gradient r, so u grows by W - z (`update_duals_`).

The set of tensors of low rank is not convex, so ADMM is a heuristic here. If it converges, W = z meets the budget.

Source: M. Yin, H. Phan, X. Zang, S. Liao, B. Yuan, "BATUDE", AAAI 2022, https://doi.org/10.1609/aaai.v36i8.20869;
scaled form, residuals and nonconvex constraints from S. Boyd et al., "Distributed Optimization and Statistical Learning
via the Alternating Direction Method of Multipliers", 2011, sections 3.1.1, 3.3 and 9.1. Unlike the paper, which picks
ranks greedily site by site, each round solves one knapsack over all sites; its losses can be measured on images
(`metrics`); and from round to round the budget shrinks and rho grows (`training.rounds`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batude_fx.budget.knapsack import allocate
from batude_fx.budget.rank_options import FLOPS, RankOptions
from batude_fx.graph.sites import ConvSite
from batude_fx.support.arrays import Integers
from batude_fx.tucker.decomposition import mode_product
from batude_fx.tucker.dense_layers import from_canonical, to_canonical
from batude_fx.tucker.metric import Metric
from batude_fx.tucker.ranks import Ranks, SiteLoss
from batude_fx.tucker.spectra import Spectrum, metric_spectrum, weight_spectrum


@dataclass(frozen=True)
class Constraint:
    """A site whose weight is to become of low rank.

    Attributes:
        site: The site.
        layer: Its dense layer; `layer.weight` is trained.
        options: The ranks that the site may get, and their costs.
    """

    site: ConvSite
    layer: nn.Module
    options: RankOptions

    @property
    def weight(self) -> nn.Parameter:
        """The trained weight, in the layer's own layout."""
        return cast("nn.Parameter", self.layer.weight)


@dataclass(frozen=True)
class Residuals:
    """How far the iteration is from convergence; both residuals are 0 there.

    Attributes:
        primal: ||W - z|| / ||W||.
        dual: ||z - previous z|| / ||W||; Boyd et al. have a factor rho in it.
    """

    primal: float
    dual: float


class Lagrangian:
    """The low-rank copies z of the weights W, the scaled dual variables u, and the penalty that pulls W towards z.

    Args:
        constraints: Site name to constraint.
        rho: Weight of the penalty; `rescale_` changes it between rounds.

    Attributes:
        z: Site name to the low-rank copy, in the layout of the weight; until the first projection a copy of the weight.
        u: Site name to the scaled dual variable, in the same layout.
        ranks: Site name to the ranks of z; None where it is dense.
        flops: Flops of all constrained sites at these ranks.
    """

    def __init__(self, constraints: Mapping[str, Constraint], *, rho: float) -> None:
        self.constraints = dict(constraints)
        self.rho = rho
        self.z = {name: constraint.weight.detach().clone() for name, constraint in self.constraints.items()}
        self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}
        self.ranks: dict[str, Ranks | None] = dict.fromkeys(self.constraints)
        self.flops = int(sum(constraint.options.dense[FLOPS] for constraint in self.constraints.values()))
        self._previous_z = dict(self.z)
        self._weights = [constraint.weight for constraint in self.constraints.values()]
        self._targets = list(self.z.values())  # z - u, as the penalty is rho / 2 ||W - (z - u)||^2

    def penalty_(self) -> None:
        """Add rho (W - z + u), the gradient of the penalty, to the gradients of the weights after `backward`."""
        pairs = zip(self._weights, self._targets, strict=True)
        trained = [(weight.grad, weight.detach(), target) for weight, target in pairs if weight.grad is not None]
        if not trained:  # all weights are frozen
            return
        gradients, weights, targets = ([triple[i] for triple in trained] for i in range(3))
        torch._foreach_add_(gradients, weights, alpha=self.rho)
        torch._foreach_sub_(gradients, targets, alpha=self.rho)

    def project_(self, capacity: Integers, metrics: Mapping[str, Metric] | None = None) -> None:
        """Do the z-step: choose the ranks that lose least of W + u within the capacity, and truncate z to them.

        Processes share the decompositions; all of them get the same ranks and the same z.

        Args:
            capacity: (2,) most flops and most parameters of all constrained sites together.
            metrics: Site name to the metric in which losses are compared; at other sites it is the plain norm. The
                metric affects the ranks alone. z is truncated in the plain norm, which is that of the penalty; in the
                oblique directions of a metric it would be further from W than necessary.

        Raises:
            BudgetError: When no choice of ranks fits.
        """
        owned = [name for index, name in enumerate(self.constraints) if _is_owner(index)]
        spectra = {name: self._spectrum(name) for name in owned}
        losses = {name: spectrum.loss() for name, spectrum in spectra.items()}
        losses |= {name: metric_spectrum(metrics[name]).loss() for name in owned if metrics and name in metrics}
        options = [
            self._options_with_losses(index, name, losses.get(name)) for index, name in enumerate(self.constraints)
        ]
        rows = allocate(options, capacity)
        self.flops = int(sum(site.costs[row, FLOPS] for site, row in zip(options, rows, strict=True)))
        self._previous_z, self.z = self.z, {}
        for index, (name, row) in enumerate(zip(self.constraints, rows, strict=True)):
            self.ranks[name] = self._ranks_of_row(name, row)
            self.z[name] = self._truncated(index, name, spectra.get(name))
        self._update_targets()

    def update_duals_(self) -> Residuals:
        """Do the u-step: add W - z to u."""
        gaps = {name: constraint.weight.detach() - self.z[name] for name, constraint in self.constraints.items()}
        self.u = {name: self.u[name] + gap for name, gap in gaps.items()}
        self._update_targets()
        return self.residuals()

    def reset_duals_(self) -> None:
        """Set u to zero, so that the next projection truncates the weights themselves."""
        self.u = {name: torch.zeros_like(u) for name, u in self.u.items()}
        self._update_targets()

    def residuals(self) -> Residuals:
        """Return the distance of W from z, and of z from its value before the last projection."""
        size = _norm(constraint.weight.detach() for constraint in self.constraints.values())
        gap = _norm(constraint.weight.detach() - self.z[name] for name, constraint in self.constraints.items())
        change = _norm(self.z[name] - self._previous_z[name] for name in self.z)
        return Residuals(primal=gap / size, dual=change / size)

    def state_dict(self) -> dict[str, Any]:
        """Return everything besides the weights that the next steps depend on, for checkpoints."""
        ranks = {name: pair and [pair.rank_out, pair.rank_in] for name, pair in self.ranks.items()}
        return {
            "rho": self.rho, "flops": self.flops, "ranks": ranks, "z": self.z, "u": self.u, "last_z": self._previous_z
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rho, self.flops = state["rho"], state["flops"]
        self.ranks = {name: pair and Ranks(*pair) for name, pair in state["ranks"].items()}
        self.z, self.u, self._previous_z = (
            {name: state[key][name].to(constraint.weight) for name, constraint in self.constraints.items()}
            for key in ("z", "u", "last_z")
        )
        self._update_targets()

    def rescale_(self, rho: float) -> None:
        """Change rho. The dual variable y = rho u stays the same, so u is divided by the factor by which rho grows."""
        self.u = {name: u * (self.rho / rho) for name, u in self.u.items()}
        self.rho = rho
        self._update_targets()

    def _weight_plus_dual(self, name: str) -> Tensor:
        """Return W + u of a site as (groups, C_out, C_in, k...)."""
        constraint = self.constraints[name]
        return to_canonical(constraint.weight.detach() + self.u[name], constraint.layer)

    def _spectrum(self, name: str) -> Spectrum:
        return weight_spectrum(self._weight_plus_dual(name), pointwise=self.constraints[name].site.is_pointwise)

    def _options_with_losses(self, index: int, name: str, loss: SiteLoss | None) -> RankOptions:
        """Return the options of a site with their losses, which one process computes and the others receive."""
        constraint = self.constraints[name]
        channels = constraint.site.group_out_channels, constraint.site.group_in_channels
        lengths = [1 + (min(channels) if constraint.site.is_pointwise else count) for count in channels]
        losses = torch.zeros(sum(lengths), device=constraint.weight.device)  # float32: Apple's GPUs have no doubles
        if loss is not None:
            losses.copy_(torch.from_numpy(np.concatenate([loss.out, loss.in_])))
        out, in_ = torch.split(_from_owner(losses, index).cpu().double(), lengths)
        return constraint.options.with_losses(SiteLoss(out.numpy(), in_.numpy()))

    def _ranks_of_row(self, name: str, row: int) -> Ranks | None:
        options = self.constraints[name].options
        return None if options.is_dense[row] else Ranks(*options.ranks[row].tolist())

    def _truncated(self, index: int, name: str, spectrum: Spectrum | None) -> Tensor:
        layer = self.constraints[name].layer
        z = self._weight_plus_dual(name)
        if spectrum is not None:
            z = truncate(z, spectrum, self.ranks[name])
        return _from_owner(from_canonical(z, layer).contiguous(), index)

    def _update_targets(self) -> None:
        self._targets = [self.z[name] - self.u[name] for name in self.constraints]


def truncate(weight: Tensor, spectrum: Spectrum, ranks: Ranks | None) -> Tensor:
    """Return a weight truncated to the given ranks: each mode is projected onto its leading directions.

    Args:
        weight: (groups, C_out, C_in, k...).
        spectrum: The spectrum of this weight, from `weight_spectrum`.
        ranks: The ranks per group; None returns the weight unchanged.

    Returns:
        (groups, C_out, C_in, k...), of these ranks.
    """
    if ranks is None:
        return weight
    for mode, modes, rank in ((0, spectrum.out, ranks.rank_out), (1, spectrum.in_, ranks.rank_in)):
        if modes is not None and rank < modes.energy.shape[1]:
            projection = modes.decode[..., :rank] @ modes.encode[:, :rank]  # (groups, C, C)
            weight = mode_product(weight, projection, mode)
    return weight


def _is_owner(index: int) -> bool:
    """Return whether this process computes the decomposition of the site with this index."""
    return not dist.is_initialized() or index % dist.get_world_size() == dist.get_rank()


def _from_owner(tensor: Tensor, index: int) -> Tensor:
    """Return the tensor that the process has which owns the site; all processes must call this."""
    if dist.is_initialized():
        dist.broadcast(tensor, index % dist.get_world_size())
    return tensor


def _norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all elements of all tensors."""
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())
