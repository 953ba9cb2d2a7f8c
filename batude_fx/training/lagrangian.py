"""BC-ADL, the budget-constrained alternating direction Lagrangian: weights that learn to be of low rank.

Minimise the task's loss of the weights W subject to a budget on what their ranks cost. Every weight has a twin z that
always meets the budget, and a scaled dual u that remembers how far they have been apart:

1. W-step: ordinary training steps on `loss(W) + rho / 2 * ||W - z + u||^2`; `penalty_` adds the gradient.
2. z-step: `project_` finds the ranks that lose least of `W + u` within the budget, all sites at once, and makes z the
   thresholded `W + u`.
3. u-step: `update_duals_` adds `W - z` to u, and tells how far the two are from each other.

Source: M. Yin, H. Phan, X. Zang, S. Liao, B. Yuan, "BATUDE", AAAI 2022, https://doi.org/10.1609/aaai.v36i8.20869;
scaled form and residuals from S. Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating
Direction Method of Multipliers", 2011, sections 3.1.1, 3.3 and 9.1. Unlike the paper, which picks ranks greedily site
by site, each round solves one knapsack over all sites (`allocation`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batude_fx.budget.knapsack import allocate
from batude_fx.budget.rank_options import RankOptions
from batude_fx.graph.sites import ConvSite
from batude_fx.support.arrays import Integers
from batude_fx.tucker.decomposition import mode_product
from batude_fx.tucker.dense_layers import from_canonical, to_canonical
from batude_fx.tucker.ranks import Ranks, SiteLoss
from batude_fx.tucker.spectra import Metric, Spectrum, metric_spectrum, weight_spectrum


@dataclass(frozen=True)
class Constraint:
    """One site whose weight is to become of low rank.

    Attributes:
        site: The site.
        layer: Its dense layer; `layer.weight` is trained.
        options: The ranks it may get, and what they cost.
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
    """How far W and z are from agreeing, and z from standing still; both relative to the norm of W."""

    primal: float
    dual: float


class Lagrangian:
    """The split weights of a network, their duals, and the penalty that pulls W and z together.

    Args:
        constraints: Site name to constraint.
        rho: Weight of the penalty; may be changed between rounds with `rescale_`.

    Attributes:
        z: Site name to the twin of its weight; until the first projection the weight itself.
        u: Site name to the scaled dual.
        ranks: Site name to the ranks of z; None where it is dense.
        flops: What the constrained sites need at these ranks.
    """

    def __init__(self, constraints: Mapping[str, Constraint], *, rho: float) -> None:
        self.constraints = dict(constraints)
        self.rho = rho
        self.z = {name: one.weight.detach().clone() for name, one in self.constraints.items()}
        self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}
        self.ranks: dict[str, Ranks | None] = dict.fromkeys(self.constraints)
        self.flops = int(sum(one.options.dense[0] for one in self.constraints.values()))
        self._last_z = dict(self.z)
        self._weights = [one.weight for one in self.constraints.values()]
        self._targets = list(self.z.values())  # z - u, which is all that the penalty needs

    def penalty_(self) -> None:
        """Add the gradient of `rho / 2 * ||W - z + u||^2` to the weights' gradients; call it after `backward`."""
        pairs = zip(self._weights, self._targets, strict=True)
        reached = [(w.grad, w.detach(), target) for w, target in pairs if w.grad is not None]
        if not reached:  # all of them are frozen
            return
        gradients, weights, targets = ([parts[i] for parts in reached] for i in range(3))
        torch._foreach_add_(gradients, weights, alpha=self.rho)
        torch._foreach_sub_(gradients, targets, alpha=self.rho)

    def project_(self, capacity: Integers, metrics: Mapping[str, Metric] | None = None) -> None:
        """z-step: the ranks within the capacity that lose least of `W + u`, and z of exactly these ranks.

        Several processes share the spectral work; all of them get the same ranks and the same z.

        Args:
            capacity: (2,) most flops and most parameters of all constrained sites together.
            metrics: Site name to the metric that says which errors matter, and so how the budget is shared out; the
                plain norm of the weight elsewhere. z is the nearest to `W + u` in this norm in either case, as the
                penalty is: directions of a metric are oblique, and W would be pulled away from it.

        Raises:
            BudgetError: When no choice of ranks fits.
        """
        ours = [name for index, name in enumerate(self.constraints) if _is_ours(index)]
        spectra = {name: self._spectrum(name) for name in ours}
        losses = {name: spectrum.loss() for name, spectrum in spectra.items()}
        losses |= {name: metric_spectrum(metrics[name]).loss() for name in ours if metrics and name in metrics}
        judged = [self._judged(index, name, losses.get(name)) for index, name in enumerate(self.constraints)]
        rows = allocate(judged, capacity)
        self.flops = int(sum(options.costs[row, 0] for options, row in zip(judged, rows, strict=True)))
        self._last_z, self.z = self.z, {}
        for index, (name, row) in enumerate(zip(self.constraints, rows, strict=True)):
            self.ranks[name] = self._ranks(name, row)
            self.z[name] = self._thresholded(index, name, spectra.get(name))
        self._retarget()

    def update_duals_(self) -> Residuals:
        """u-step: add `W - z` to u."""
        gaps = {name: one.weight.detach() - self.z[name] for name, one in self.constraints.items()}
        self.u = {name: self.u[name] + gap for name, gap in gaps.items()}
        self._retarget()
        return self.residuals()

    def forget_duals_(self) -> None:
        """Set u to zero: the next projection is of the weights themselves."""
        self.u = {name: torch.zeros_like(u) for name, u in self.u.items()}
        self._retarget()

    def residuals(self) -> Residuals:
        """How far W and z are from each other, and z from where it was before the last projection."""
        size = _norm(one.weight.detach() for one in self.constraints.values())
        gap = _norm(one.weight.detach() - self.z[name] for name, one in self.constraints.items())
        moved = _norm(self.z[name] - self._last_z[name] for name in self.z)
        return Residuals(primal=gap / size, dual=moved / size)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on besides the weights; for checkpoints."""
        ranks = {name: one and [one.rank_out, one.rank_in] for name, one in self.ranks.items()}
        return {
            "rho": self.rho, "flops": self.flops, "ranks": ranks, "z": self.z, "u": self.u, "last_z": self._last_z
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.rho, self.flops = state["rho"], state["flops"]
        self.ranks = {name: one and Ranks(*one) for name, one in state["ranks"].items()}
        self.z, self.u, self._last_z = (
            {name: state[part][name].to(one.weight) for name, one in self.constraints.items()}
            for part in ("z", "u", "last_z")
        )
        self._retarget()

    def rescale_(self, rho: float) -> None:
        """Change rho; the scaled duals are divided by what it grows by, so that the unscaled ones stay."""
        self.u = {name: u * (self.rho / rho) for name, u in self.u.items()}
        self.rho = rho
        self._retarget()

    def _sum(self, name: str) -> Tensor:
        """`W + u` as (groups, C_out, C_in, k...)."""
        one = self.constraints[name]
        return to_canonical(one.weight.detach() + self.u[name], one.layer)

    def _spectrum(self, name: str) -> Spectrum:
        return weight_spectrum(self._sum(name), pointwise=self.constraints[name].site.is_pointwise)

    def _judged(self, index: int, name: str, loss: SiteLoss | None) -> RankOptions:
        """The options of a site with their losses, which its process computes and all others receive."""
        one = self.constraints[name]
        full = one.site.group_out_channels, one.site.group_in_channels
        lengths = [1 + (min(full) if one.site.is_pointwise else channels) for channels in full]
        losses = torch.zeros(sum(lengths), device=one.weight.device)  # float32: Apple's GPUs have no doubles
        if loss is not None:
            losses.copy_(torch.from_numpy(np.concatenate([loss.out, loss.in_])))
        out, in_ = torch.split(_from_owner(losses, index).cpu().double(), lengths)
        return one.options.with_losses(SiteLoss(out.numpy(), in_.numpy()))

    def _ranks(self, name: str, row: int) -> Ranks | None:
        options = self.constraints[name].options
        return None if options.is_dense[row] else Ranks(*options.ranks[row].tolist())

    def _thresholded(self, index: int, name: str, spectrum: Spectrum | None) -> Tensor:
        layer = self.constraints[name].layer
        z = self._sum(name)
        if spectrum is not None:
            z = truncate(z, spectrum, self.ranks[name])
        return _from_owner(from_canonical(z, layer).contiguous(), index)

    def _retarget(self) -> None:
        self._targets = [self.z[name] - self.u[name] for name in self.constraints]


def truncate(weight: Tensor, spectrum: Spectrum, ranks: Ranks | None) -> Tensor:
    """A weight with both modes cut to their ranks.

    Args:
        weight: (groups, C_out, C_in, k...).
        spectrum: Of this weight, by `weight_spectrum`.
        ranks: Per group; None leaves the weight as it is.

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


def _is_ours(index: int) -> bool:
    """Whether this process does the spectral work of a site."""
    return not dist.is_initialized() or index % dist.get_world_size() == dist.get_rank()


def _from_owner(tensor: Tensor, index: int) -> Tensor:
    """The tensor of the process whose work the site is."""
    if dist.is_initialized():
        dist.broadcast(tensor, index % dist.get_world_size())
    return tensor


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())
